"""The import hook: every order of imports, and nothing that could break the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AUTO = """\
{before}
class GptqHfQuantizer: pass
class AwqQuantizer: pass
class GPTQConfig:
    def __init__(self, **kwargs): self.bits = kwargs["bits"]
    @classmethod
    def from_dict(cls, block, *args, **kwargs): return cls(**block)
    def to_dict(self): return vars(self)
class AwqConfig(GPTQConfig): pass
class BitsAndBytesConfig(GPTQConfig): pass
class CompressedTensorsConfig(GPTQConfig): pass
class AutoRoundConfig(GPTQConfig): pass
AUTO_QUANTIZER_MAPPING = {{
    "gptq": GptqHfQuantizer, "awq": AwqQuantizer, "bitsandbytes_4bit": object,
    "bitsandbytes_8bit": object, "compressed-tensors": object, "auto-round": object,
}}
AUTO_QUANTIZATION_CONFIG_MAPPING = {{
    "gptq": GPTQConfig, "awq": AwqConfig, "bitsandbytes_4bit": BitsAndBytesConfig,
    "bitsandbytes_8bit": BitsAndBytesConfig, "compressed-tensors": CompressedTensorsConfig,
    "auto-round": AutoRoundConfig,
}}
def get_hf_quantizer(config, *args): return "stock"
STOCK = dict(AUTO_QUANTIZER_MAPPING), dict(AUTO_QUANTIZATION_CONFIG_MAPPING)
{after}
"""


@pytest.fixture
def site(tmp_path):
    """Return a folder with a Transformers of a few lines, and qplug's entry point."""
    for package in ("transformers", "transformers/quantizers", "transformers/utils"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "transformers/utils/quantization_config.py").write_text(
        "class QuantizationConfigMixin: pass\n"
    )
    write_auto(tmp_path)
    metadata = tmp_path / "qplug-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: qplug\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\nqplug = qplug._autoload:install\n"
    )
    return tmp_path


def write_auto(site, before="", after=""):
    path = site / "transformers/quantizers/auto.py"
    path.write_text(AUTO.format(before=before, after=after))


def run(site, code, **environment):
    """Run `code` in a new process; return what it printed as JSON."""
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    clean = {k: v for k, v in os.environ.items() if "AUTOLOAD" not in k}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


REPORT = """
import json, qplug._autoload as autoload
from transformers.quantizers import auto
ours = auto.AUTO_QUANTIZER_MAPPING["gptq"] is not auto.GptqHfQuantizer
print(json.dumps([autoload.state, ours]))
"""


def test_import_is_cheap(tmp_path):
    code = """
import sys, time
start = time.perf_counter()
import qplug
took = time.perf_counter() - start
import json
heavy = [n for n in ("torch", "transformers", "numpy", "logging") if n in sys.modules]
print(json.dumps([took, heavy, qplug.__version__]))
"""
    runs = [run(tmp_path, code)[0] for _ in range(5)]
    assert [heavy for _, heavy, _ in runs] == [[]] * 5
    assert min(took for took, _, _ in runs) < 0.005


@pytest.mark.parametrize(
    "first", ["import qplug", "import transformers.quantizers.auto\nimport qplug"]
)
def test_registers_before_and_after(site, first):
    assert run(site, first + REPORT)[0] == ["registered", True]


def test_waits_while_half_imported(site):
    """Transformers' own import of torch calls the entry point in the middle of `auto`."""
    write_auto(site, "import qplug, sys\nqplug.seen = qplug._autoload.state", "import colorsys")
    found, _ = run(site, "import transformers.quantizers.auto, qplug, sys" + REPORT)
    assert found == ["registered", True]
    code = (
        "import json, transformers.quantizers.auto, qplug\n"
        "before = qplug._autoload.state\nimport wave\n"
        "print(json.dumps([qplug.seen, before, qplug._autoload.state]))"
    )
    assert run(site, code)[0] == ["waiting", "waiting", "registered"]


def test_switch(site):
    assert run(site, "import qplug" + REPORT, QPLUG_AUTOLOAD="0")[0] == ["off", False]
    code = "import qplug\nqplug.use('gptq')" + REPORT
    assert run(site, code, QPLUG_AUTOLOAD="0")[0] == ["registered", True]


def test_an_unknown_transformers_is_left_alone(site):
    """A mapping that is not there any more: remembered, logged at the first quantized load only."""
    write_auto(site, after="del AUTO_QUANTIZER_MAPPING['gptq']")
    code = """
import qplug, json
from transformers.quantizers import auto
class Dense: pass
class Quantized: quantization_config = {}
found = [auto.get_hf_quantizer(Dense())]
import sys; print("dense is loaded", file=sys.stderr)
found += [auto.get_hf_quantizer(Quantized()), auto.get_hf_quantizer(Quantized())]
print(json.dumps([qplug._autoload.state, repr(qplug._autoload.error), *found]))
"""
    found, log = run(site, code)
    assert found == ["failed", "KeyError('gptq')", "stock", "stock", "stock"]
    before, _, after = log.partition("dense is loaded")
    assert "qplug" not in before
    assert after.count("could not register") == 1


def test_stock_configs_where_stock_is_usable(site):
    code = """
import qplug, json
from qplug.transformers import compat
from transformers.quantizers import auto
block = {"bits": 4, "quant_method": "gptq", "dynamic": {"x": 1}}
def load():
    config = auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"].from_dict(dict(block))
    return [type(config).__name__, type(config) is auto.GPTQConfig, config.to_dict() == block]
found = [load()]
compat.stock_lacks = lambda method: None
found.append(load())
with qplug.use("gptq"):
    found.append(load())
found.append(load())
qplug.restore()
same = (dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING))
found.append(same == auto.STOCK)
print(json.dumps(found))
"""
    ours, stock = ["GPTQConfig", False, True], ["GPTQConfig", True, False]
    write_auto(site)
    found, _ = run(site, "import transformers.quantizers.auto\n" + code)
    assert found == [ours, stock, ours, stock, True]


@pytest.mark.parametrize(
    ("code", "environment", "state"),
    [
        ("import torch", {}, "registered"),
        ("import torch", {"QPLUG_AUTOLOAD": "0"}, "off"),
        ("import torch", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "registered"),
    ],
)
def test_torch_calls_the_entry_point(site, code, environment, state):
    loaded = "\nimport sys; at_torch = 'qplug' in sys.modules" + REPORT
    found, _ = run(site, code + loaded.replace("[autoload", "[at_torch, autoload"), **environment)
    # Without torch's autoload the report's own `import qplug` is what registers.
    assert found == [not environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD"), state, state != "off"]


def test_torch_survives_a_broken_door(site):
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "qplug.transformers": raise ZeroDivisionError("broken")
sys.meta_path.insert(0, Broken())
import torch
import transformers.quantizers.auto
import qplug._autoload, json
print(json.dumps([qplug._autoload.state, repr(qplug._autoload.error)]))
"""
    found, _ = run(site, code)
    assert found == ["failed", "ZeroDivisionError('broken')"]


def test_entry_point_is_declared():
    import tomllib

    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["torch.backends"] == {"qplug": "qplug._autoload:install"}
