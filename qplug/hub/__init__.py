"""Model repositories on a hub: read by ranges, fetched by files, written in one commit.

The only room that moves anything over a network, and all of it through huggingface_hub (1.0 to
2.x), whose settings hold: `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`, the cache. A revision
becomes a commit hash at the first request, and everything after is about that commit. File names
are other people's: each is checked before it is part of a path or of an address, because the
client's own calls follow `../` into other repositories with the user's token.
"""

from .client import Say, quiet, told
from .source import HubSource, Listed
from .target import Pushed, Target, Uploaded

__all__ = ["HubSource", "Listed", "Pushed", "Say", "Target", "Uploaded", "quiet", "told"]
