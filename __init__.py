"""Entry point of the ComfyUI extension. Outside ComfyUI (no package) it does nothing; use `allegro_model` there."""

if __package__:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
