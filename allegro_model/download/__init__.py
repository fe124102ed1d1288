"""Getting released weights: named files from a model hub, resumed, checked, and complete or not there at all."""

from .hub import is_offline
from .plan import Item, Plan, by_hand, make_plan, unasked
from .targets import Target, comfyui_folders, comfyui_targets, snapshot_targets
from .transfer import Watch, fetch

__all__ = [
    "Item",
    "Plan",
    "Target",
    "Watch",
    "by_hand",
    "comfyui_folders",
    "comfyui_targets",
    "fetch",
    "is_offline",
    "make_plan",
    "snapshot_targets",
    "unasked",
]
