"""A judge behind an address: any program in any environment, for evaluation (it has no gradient).

    vader-nb evaluate runs/mine held_out_reward=http://localhost:8000/score

The protocol: a POST of JSON, `{"prompts": [text, …], "fps": 8, "frames": "…"}`, where `frames` is a
.npy file in base64 that holds uint8 (B, F, H, W, 3), the clips rounded to 8 bits as in a video
file; `fps` is null if it is not known. The answer: `{"scores": [number, …]}`, one finite number
per clip, higher is better. A whole server:

    import base64, io, json
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    import numpy as np


    def score(clip, prompt):  # uint8 (F, H, W, 3), and a text
        return float(clip.mean()) / 255


    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            clips = np.load(io.BytesIO(base64.b64decode(request["frames"])))
            scores = [score(clip, text) for clip, text in zip(clips, request["prompts"])]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": scores}).encode())


    ThreadingHTTPServer(("127.0.0.1", 8000), Judge).serve_forever()

It is asked again, after 1, 2, 4 and 8 seconds, when it does not answer or is busy (429, 502, 503,
504). If a server is away at the start, or fails on the first clips, the run stops. If it goes
away later, only its own column of an evaluation, or that one validation, is lost; everything else
continues, with a warning.
"""

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.request
from urllib.parse import urlparse

import numpy as np
import torch

from .base import JudgeError, Reward

BUSY = (429, 502, 503, 504)  # statuses after which a server is asked again
SHOWN = 200  # characters of an answer that an error message quotes


class ServerReward(Reward):
    per_frame, differentiable = False, False

    def __init__(self, url: str, batch_size: int, timeout: float, tries: int, backoff: float):
        address = urlparse(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"a reward server's address is http://host:port/path, not {url!r}")
        for name, value in {"batch_size": batch_size, "timeout": timeout, "tries": tries}.items():
            if not value > 0:
                raise ValueError(f"{name} of {url} must be positive, got {value}")
        self.url, self.batch_size, self.timeout = url, batch_size, timeout
        self.tries, self.backoff, self.fps = tries, backoff, None
        self.name, self.fingerprint = url, f"server {url}"

    def at_fps(self, fps):
        self.fps = fps

    def check_ready(self):
        """A GET: any answer means that it is there, except 404: then the address is wrong."""
        try:
            self.ask(self.url)
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise self.failed("there is no such path (404)") from error

    @torch.no_grad()
    def scores(self, frames, prompts):
        pixels = (frames.clamp(0, 1) * 255).round().byte().permute(0, 1, 3, 4, 2).cpu().numpy()
        values = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            values += self.judge(pixels[part], prompts[part])
        return frames.new_tensor(values).unsqueeze(1)

    def judge(self, pixels: np.ndarray, prompts: list[str]) -> list[float]:
        """The scores of one request."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(pixels))
        frames = base64.b64encode(buffer.getvalue()).decode()
        body = {"prompts": prompts, "fps": self.fps, "frames": frames}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            answer = self.ask(request)
        except urllib.error.HTTPError as error:
            text = error.read(SHOWN).decode(errors="replace")
            raise self.failed(f"answered with status {error.code}: {text}") from error
        try:
            scores = json.loads(answer)["scores"]
            scores = [float(score) for score in scores]
        except (ValueError, KeyError, TypeError) as error:
            text = answer[:SHOWN].decode(errors="replace")
            raise self.failed(
                f'did not answer with JSON {{"scores": [number, …]}} but with: {text}'
            ) from error
        if len(scores) != len(prompts) or not all(map(math.isfinite, scores)):
            raise self.failed(f"answered {len(prompts)} clips with the scores {scores}"[:SHOWN])
        return scores

    def ask(self, request) -> bytes:
        """The answer to a request, which is repeated while the server is away or busy."""
        for wait in [self.backoff * 2**i for i in range(self.tries - 1)] + [None]:
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return response.read()
            except (OSError, http.client.HTTPException) as error:  # HTTPError is an OSError
                if isinstance(error, urllib.error.HTTPError) and error.code not in BUSY:
                    raise
                if wait is None:
                    reason = getattr(error, "reason", None) or error or type(error).__name__
                    hint = "start it again, or raise timeout, now"
                    text = f"did not answer in {self.tries} tries: {reason}; {hint} {self.timeout}"
                    raise self.failed(f"{text} seconds") from error
                time.sleep(wait)
        raise AssertionError("the last try has no wait")

    def failed(self, what: str) -> JudgeError:
        return JudgeError(f"the reward server {self.url}: {what}")


def server(
    url: str, *, batch_size: int = 8, timeout: float = 120, tries: int = 5, backoff: float = 1.0
) -> Reward:
    """Scores from a server; `reward="http://host:port/score"` means the same.

    The protocol, and a server to start from, are in the docstring of the module `vader_nb.rewards.remote`.

    Args:
        url: where to POST.
        batch_size: clips in one request; of large clips (81 frames of 480 x 832 are 97 MB) one.
        timeout: seconds for one answer.
        tries: how often a server that is away or busy is asked before it counts as gone.
        backoff: seconds before the second try; each wait is twice the one before.

    Raises:
        ValueError: for what is no address.
    """
    return ServerReward(url, batch_size, timeout, tries, backoff)
