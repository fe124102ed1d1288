"""The only place that imports ComfyUI's internals: what goes in and out of the host is translated here."""
