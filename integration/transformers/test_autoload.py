"""The real Transformers, in every order that it and torch can be imported in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

FOLDER = Path(__file__).parents[2] / "tests/golden/gptq-4b-asym-g64"
STATE = """
import json, qplug._autoload
print(json.dumps([qplug._autoload.state, repr(qplug._autoload.error)]))
"""


@pytest.fixture
def site(tmp_path):
    """Return a folder with the entry point, should qplug not be installed."""
    metadata = tmp_path / "qplug-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qplug\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\nqplug = qplug._autoload:install\n"
    )
    return tmp_path


def run(site, code, **environment):
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {k: v for k, v in os.environ.items() if "AUTOLOAD" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "first",
    [
        # Half imported when torch calls; `modeling_utils`, which every load needs, is the next.
        "import transformers.quantizers.auto, transformers.modeling_utils",
        "import transformers.modeling_utils, torch",
        "from transformers import LlamaForCausalLM",
    ],
)
def test_registered_whatever_comes_first(site, first):
    assert run(site, first + STATE) == ["registered", "None"]


def test_a_script_without_a_word_of_qplug(site):
    code = f"""
from transformers import AutoModelForCausalLM
def load(): return AutoModelForCausalLM.from_pretrained({str(FOLDER)!r}, dtype="float32")
kind = type(load().model.layers[0].mlp.up_proj).__name__
import sys
peers = [name for name in ("accelerate", "gptqmodel", "optimum", "awq") if name in sys.modules]
import qplug, json
qplug.restore()
try: load()
except ImportError as error: print(json.dumps([kind, peers, str(error)]))
"""
    kind, peers, stock = run(site, code)
    assert kind == "QuantLinear"
    assert not {"gptqmodel", "optimum", "awq"} & set(peers)
    assert "requires optimum" in stock


def test_switched_off(site):
    code = f"""
import json
from transformers import AutoModelForCausalLM
try: AutoModelForCausalLM.from_pretrained({str(FOLDER)!r})
except ImportError as error: print(json.dumps(str(error)))
"""
    assert "requires optimum" in run(site, code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_spawned_child(site):
    code = """
import json, multiprocessing
from concurrent.futures import ProcessPoolExecutor
with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
    child = pool.submit(eval, "__import__('transformers.modeling_utils') and "
        "__import__('sys').modules['qplug._autoload'].state")
    print(json.dumps(child.result()))
"""
    assert run(site, code) == "registered"
