"""Videos from ComfyUI servers, for scripts. Needs nothing but Python: neither PyTorch nor ComfyUI.

    from pathlib import Path
    from allegro_model.client import Batch, ComfyServer, build_job, text_to_video

    server = ComfyServer("http://127.0.0.1:8188")
    graph = text_to_video("the sun rises over the sea", seed=7)
    for file in server.run(graph, on_event=lambda event: print(event.node, event.done, event.total)):
        server.download(file, Path("sunrise.mp4"))

    jobs = [build_job("tiny", {"prompt": prompt}, {}) for prompt in ("the moon rises over the sea", "clouds drift left")]
    for job in Batch(jobs, [server, ComfyServer("http://127.0.0.1:8189")], Path("outputs")).run():
        print(job.files, job.error)
"""

from .batch import Batch, Limits, Watcher, result_names
from .events import Event
from .graphs import OPTIONS, apply_options, base_graph, override, read_graph, text_to_video, title_of
from .jobs import Job, build_job, make_job, read_rows
from .journal import JOURNAL
from .server import ComfyServer, Graph, RemoteFile, RunState

__all__ = [
    "JOURNAL", "OPTIONS", "Batch", "ComfyServer", "Event", "Graph", "Job", "Limits", "RemoteFile", "RunState", "Watcher",
    "apply_options", "base_graph", "build_job", "make_job", "override", "read_graph", "read_rows", "result_names",
    "text_to_video", "title_of",
]
