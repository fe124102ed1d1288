"""The ComfyUI nodes. A feature that cannot be loaded is left out with one line in the log; the others work."""

from __future__ import annotations

import logging
import sys
from importlib import import_module

from .schema import ComfyExtension, io

logger = logging.getLogger(__name__)

# Module of this package -> node classes in it, in the order of the menu.
FEATURES = {
    "loaders": ("LoadAllegroDiT", "LoadAllegroT5", "LoadAllegroVAE"),
    "lora": ("AllegroLoraLoader",),
    "text": ("T5Encode",),
    "storyboard": ("AllegroStoryboard",),
    "latent": ("EmptyAllegroLatentVideo",),
    "ti2v": ("AllegroImageToVideo", "AllegroKeyframes", "AllegroContinueVideo", "AllegroJoinVideos"),
    "sample": ("AllegroScheduler", "AllegroSampler"),
    "cache": ("AllegroCache",),
    "speed": ("AllegroAttention", "AllegroCompile"),
    "vae": ("VideoVAEEncode", "VideoVAEDecode"),
    "vfi": ("LoadAllegroFrameInterpolator", "FrameInterpolate"),
    "report": ("AllegroReport",),
    "download": ("AllegroDownload",),
}


def load_nodes() -> list[type[io.ComfyNode]]:
    """Every node class that can be used in this ComfyUI."""
    found = []
    for module_name, class_names in FEATURES.items():
        try:
            module = import_module(f".{module_name}", __package__)
        except Exception:  # whatever goes wrong in one feature must not take the others with it
            logger.exception("Allegro: the nodes %s are missing because their module failed to load",
                             ", ".join(class_names))
            continue
        for class_name in class_names:
            node = getattr(module, class_name)
            try:
                node.define_schema()  # ComfyUI drops every node behind one whose schema fails
            except Exception:
                logger.exception("Allegro: the node %s is missing because its definition failed", class_name)
                continue
            found.append(node)
    return found


def warn_about_second_copy() -> None:
    """ComfyUI keeps the nodes of the pack that was loaded last; which one that is should not be a surprise."""
    own = __package__.rpartition(".")[0] + ".allegro_model"
    others = [name for name in sys.modules if name.endswith(".allegro_model") and name != own]
    if others:
        logger.warning("Allegro is installed twice; the other copy is %s. Remove one of them.",
                       others[0].removesuffix(".allegro_model"))


class AllegroExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return load_nodes()


async def comfy_entrypoint() -> AllegroExtension:
    """Called once by ComfyUI."""
    warn_about_second_copy()
    return AllegroExtension()
