"""Judges without a gradient: real files, a vision-language model, a server that may be killed."""

import inspect
import io
import json
import socket
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from PIL import Image

import vader_nb
from vader_nb import cli, rewards
from vader_nb.evaluation import Validation
from vader_nb.rewards import JudgeError, check, parse, remote
from vader_nb.zoo import world

FAST = {"num_inference_steps": 2, "num_frames": 5, "height": 32, "width": 32}
PROMPTS = ["a red star growing on a white background", "a blue circle moving left"]


@pytest.fixture(scope="module")
def clips():
    """Three clips (8, 3, 64, 64): still, moving, noise."""
    generator = torch.Generator().manual_seed(0)
    moving = world.render([world.Spec("red", "star", "moving left", "gray")], generator)[0]
    return torch.stack([moving[:1].expand(8, -1, -1, -1), moving, torch.rand_like(moving)])


@pytest.fixture(scope="module")
def tiny():
    return vader_nb.load("tiny")


# ------------------------------------------------------------------------------------------- real files


def test_jpeg_bytes_are_those_of_pillows_files(clips):
    pixels = (clips[1, 3].permute(1, 2, 0) * 255).round().byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=50)
    score = rewards.jpeg_bytes(50)(clips[1:2, 3:4], [""])
    assert score.item() == pytest.approx(-8 * len(buffer.getvalue()) / 64**2)


def test_h264_bytes_see_time_where_jpeg_bytes_do_not(clips):
    still, moving, noise = rewards.h264_bytes()(clips, [""] * 3)
    assert 0 > still > moving > noise
    shuffled = clips[1, torch.tensor([0, 4, 1, 6, 2, 7, 3, 5])]
    pair = torch.stack([clips[1], shuffled])
    ordered, mixed = rewards.h264_bytes()(pair, [""] * 2)
    assert ordered > mixed
    torch.testing.assert_close(*rewards.jpeg_bytes()(pair, [""] * 2).split(1))
    assert rewards.h264_bytes(40)(pair, [""] * 2)[0] > ordered


@pytest.mark.parametrize(
    "text", ["jpeg_bytes", "h264_bytes(30)", "0.5 * h264_bytes + jpeg_bytes(90)"]
)
def test_files_are_the_same_each_time_one_by_one_and_at_odd_sizes(clips, text):
    judge = parse(text)
    again, alone = judge(clips, [""] * 3), [judge(clip[None], [""]) for clip in clips]
    assert torch.equal(judge(clips, [""] * 3), again)
    assert torch.equal(torch.cat(alone), again)
    assert judge(clips[..., :33, :47], [""] * 3).isfinite().all()
    assert parse(text).fingerprint == judge.fingerprint
    report = check(judge)
    assert report.passed, report
    assert "fit for evaluation" in str(report)


@pytest.mark.parametrize(
    ("text", "told"), [("jpeg_bytes(0)", "1..95, got 0"), ("h264_bytes(52)", "0..51, got 52")]
)
def test_qualities_that_there_are_not(text, told):
    with pytest.raises(ValueError, match=told):
        parse(text)


def test_training_refuses_them_and_says_what_to_do(tiny, capsys):
    told = "'jpeg bytes' is not differentiable.*held_out_reward=.*train on compressibility"
    with pytest.raises(ValueError, match=told):
        vader_nb.align(tiny, parse("brightness + jpeg_bytes"), "tiny", steps=1)
    with pytest.raises(SystemExit, match="2"):  # before a model is looked for
        cli.main(["align", "reward=h264_bytes", "model=modelscope"])
    assert "'h264 bytes' is not differentiable" in capsys.readouterr().err
    with pytest.raises(ValueError, match="jpeg_bytes has no gradient: there is no training step"):
        vader_nb.memory("tiny", "jpeg_bytes")


def test_they_are_evaluated_in_a_shell(tmp_path, capsys):
    words = [f"{key}={value}" for key, value in FAST.items()]
    words += ["reward=brightness", "held_out_reward=jpeg_bytes + 2*h264_bytes", "clips=2"]
    cli.main(["evaluate", "prompts=tiny", f"output_dir={tmp_path}", *words])
    rows = {row["metric"]: row for row in json.loads((tmp_path / "evaluation.json").read_text())}
    assert {"brightness", "jpeg bytes + 2 × h264 bytes"} <= rows.keys()
    assert rows["jpeg bytes + 2 × h264 bytes"]["base"] < 0


# ------------------------------------------------------------------------------------------------ a server

EXAMPLE = (
    inspect.getdoc(remote).partition("    import base64")[2].partition("\n\nIt is asked again")[0]
)
EXAMPLE = textwrap.dedent("    import base64" + EXAMPLE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_example(tmp_path, port):
    """The server of the module's text, as a process of its own."""
    assert "8000" in EXAMPLE
    (tmp_path / "judge.py").write_text(EXAMPLE.replace("8000", str(port)))
    process = subprocess.Popen([sys.executable, tmp_path / "judge.py"], stderr=subprocess.DEVNULL)
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise AssertionError("the example server did not start")


@pytest.fixture
def example(tmp_path):
    port = free_port()
    process = start_example(tmp_path, port)
    yield f"http://127.0.0.1:{port}/score", process, port
    process.kill()
    process.wait()


def test_the_example_server_scores_as_its_text_says(example, clips):
    url, _, _ = example
    assert len(EXAMPLE.splitlines()) <= 24
    expected = (clips * 255).round().mean(dim=(1, 2, 3, 4)) / 255
    mixed = parse(f"2 * {url} + brightness")
    torch.testing.assert_close(parse(url)(clips, ["ü"] * 3), expected, atol=1e-6, rtol=0)
    scores = mixed(clips, [""] * 3)
    torch.testing.assert_close(scores, 2 * expected + clips.mean((1, 2, 3, 4)), atol=1e-5, rtol=0)
    assert torch.equal(
        parse(f"server('{url}', batch_size=2)")(clips, [""] * 3), parse(url)(clips, [""] * 3)
    )
    assert check(parse(url)).passed
    assert (
        parse(url).fingerprint
        == f"server {url}"
        == parse(f"server('{url}', timeout=3)").fingerprint
    )


class Reference(BaseHTTPRequestHandler):
    """Answers with what the test put there; notes what it was asked."""

    answers: list = []
    asked: list = []

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        status, body = self.answers.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def answering():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Reference)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Reference.answers, Reference.asked = [], []
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (500, b"CUDA out of memory", "status 500: CUDA out of memory"),
        (404, b"", "status 404"),
        (200, b"<html>hello</html>", "not answer with JSON .* but with: <html>hello"),
        (200, b'{"score": 1}', 'but with: {"score": 1}'),
        (200, b'{"scores": [1]}', r"answered 3 clips with the scores \[1.0\]"),
        (200, b'{"scores": [1, 2, NaN]}', "1.0, 2.0, nan"),
        (200, b'{"scores": "abc"}', "but with: .*abc"),
    ],
)
def test_an_answer_that_is_none_is_shown_with_the_address(answering, clips, status, body, told):
    Reference.answers = [(status, body)]
    with pytest.raises(JudgeError, match=f"(?s){answering}.*{told}"):
        parse(answering)(clips, [""] * 3)
    assert len(Reference.asked) == 1  # and was not asked again


def test_a_busy_server_is_asked_again_and_told_the_frame_rate(answering, clips):
    Reference.answers = [(503, b"loading"), (429, b""), (200, b'{"scores": [1, 2, 3]}')]
    judge = parse(f"0.5 * server('{answering}', backoff=0.01)")
    judge.at_fps(16)
    assert judge(clips, list("abc")).tolist() == [0.5, 1.0, 1.5]
    assert [asked["prompts"] for asked in Reference.asked] == [["a", "b", "c"]] * 3
    assert Reference.asked[-1]["fps"] == 16
    Reference.answers = [(503, b"")] * 2
    with pytest.raises(
        JudgeError, match="did not answer in 2 tries: Service Unavailable; start it"
    ):
        parse(f"server('{answering}', tries=2, backoff=0.01)")(clips, [""] * 3)


def test_addresses_that_there_are_not(tiny):
    with pytest.raises(ValueError, match="address is http://host:port/path, not 'localhost'"):
        parse("server('localhost')")
    with pytest.raises(ValueError, match="batch_size of http://a must be positive, got 0"):
        parse("server('http://a', batch_size=0)")
    nobody = f"server('http://127.0.0.1:{free_port()}/score', tries=2, backoff=0.01)"
    for work in (
        lambda: vader_nb.evaluate(tiny, None, parse(nobody), PROMPTS),
        lambda: Validation(tiny, parse(f"brightness + {nobody}"), PROMPTS),
    ):
        with pytest.raises(JudgeError, match="in 2 tries: .*Connection refused; start it again"):
            work()


def test_a_shell_looks_for_the_server_before_it_trains(capsys):
    nobody = f"server('http://127.0.0.1:{free_port()}/score', tries=1)"
    with pytest.raises(SystemExit, match="2"):  # before it looks for the model's weights
        cli.main(["align", "model=modelscope", "reward=brightness", f"held_out_reward={nobody}"])
    assert "did not answer in 1 tries: " in capsys.readouterr().err


def test_a_path_that_the_server_lacks_stops_before_the_work(answering):
    Reference.do_GET = lambda self: self.send_error(404)
    try:
        with pytest.raises(JudgeError, match="there is no such path"):
            parse(answering).check_ready()
    finally:
        del Reference.do_GET
    parse(answering).check_ready()  # 501: it has no GET, and is there


def evaluate_with(tiny, judge, **options):
    settings = {"held_out": [judge], "seeds_per_prompt": 2, "batch_size": 2, "progress": False}
    settings |= {"sampling": vader_nb.Sampling(**FAST)} | options
    return vader_nb.evaluate(tiny, None, rewards.brightness(), PROMPTS, **settings)


def test_a_server_that_is_killed_costs_its_own_column(tiny, example, tmp_path):
    url, process, _ = example
    judge = parse(f"server('{url}', tries=2, backoff=0.01)")
    first, scores = [], judge.scores

    def killed_after_the_first_batch(frames, prompts):
        if first:
            process.kill()
            process.wait()
        first.append(1)
        return scores(frames, prompts)

    judge.scores = killed_after_the_first_batch
    with pytest.warns(UserWarning, match=f"{url} is left out from here on: .*Connection refused"):
        found = evaluate_with(tiny, judge)
    assert len(first) == 2
    assert found.row("prompts", "brightness").base > 0
    with pytest.raises(KeyError):
        found.row("prompts", url)
    assert f"measured only in part: {url}" in str(found)
    assert f"Measured only in part: {url}" in found.report(tmp_path / "report.html").read_text()


def test_one_that_goes_while_an_adapter_is_measured_leaves_the_base(tiny, answering):
    good = [(200, b'{"scores": [1, 2]}')] * 2
    Reference.answers = [*good, good[0], (500, b"gone")]
    with pytest.warns(UserWarning, match="status 500: gone"):
        adapter = vader_nb.lora.add(tiny, 2)
        try:
            settings = {"held_out": [parse(answering)], "batch_size": 2, "progress": False}
            settings |= {"sampling": vader_nb.Sampling(**FAST)}
            found = vader_nb.evaluate(tiny, adapter, rewards.brightness(), PROMPTS, **settings)
        finally:
            adapter.remove()
    row = found.row("prompts", answering)
    assert (row.base, row.adapter, row.name) == (1.5, None, None)
    assert found.row("prompts", "brightness").adapter is not None


def test_one_that_fails_on_the_first_clips_ends_the_evaluation(tiny, answering):
    Reference.answers = [(200, b'{"scores": []}')]
    with pytest.raises(JudgeError, match="answered 2 clips with the scores"):
        evaluate_with(tiny, parse(answering))


def test_one_that_is_started_again_is_found_again(tiny, example, tmp_path):
    url, process, port = example
    judge, again = parse(f"server('{url}', tries=12, backoff=0.02)"), []
    expected = evaluate_with(tiny, judge).row("prompts", url).base
    process.kill()
    process.wait()
    timer = threading.Timer(0.3, lambda: again.append(start_example(tmp_path, port)))
    timer.start()
    found = evaluate_with(tiny, judge).row("prompts", url).base
    timer.join()
    again[0].kill()
    again[0].wait()
    assert found == expected


def test_training_goes_on_where_a_validating_server_is_away(tiny, answering, tmp_path):
    Reference.answers = [(500, b"gone"), (200, b'{"scores": [3, 4]}')]
    validate = Validation(tiny, parse(answering), PROMPTS, sampling=vader_nb.Sampling(**FAST))
    options = {"steps": 2, "validation_steps": 1, "batch_size": 1, "rank": 2, "progress": False}
    with pytest.warns(UserWarning, match="status 500: gone"):
        run = vader_nb.align(
            tiny,
            rewards.brightness(),
            PROMPTS,
            validate=validate,
            output_dir=tmp_path / "run",
            **options,
            **FAST,
        )
    run.adapter.remove()
    key = f"validation/{answering}"
    assert [row[key] for row in run.metrics] == [pytest.approx(float("nan"), nan_ok=True), 3.5]
    assert run.best.name == "step-000002"


# --------------------------------------------------------------------------------- a vision-language model

WORDS = ["is", "it", "a", "red", "blue", "star", "circle", "the", "?", "yes", "no", "Yes", "No"]
SPECIAL = ["<unk>", "<pad>", "<image>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}<user> {% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<image> {% else %}{{ part['text'] | lower }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A LLaVA of random weights, with its processor, as a directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(SPECIAL + WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": SPECIAL[2:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **small, "image_size": 16, "patch_size": 8, "projection_dim": 32},
        text_config={"model_type": "llama", **small, "num_key_value_heads": 2, "vocab_size": len(vocabulary), "max_position_embeddings": 512},
        image_token_index=vocabulary["<image>"],
        vision_feature_select_strategy="default",
    )  # fmt: skip
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_vlms_yes_is_its_own_next_token(llava, clips):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    judge = rewards.vlm_yes(llava, "is it {prompt} ?", num_frames=2)
    score = judge(clips[1:2], ["red star"])
    processor, model = (
        kind.from_pretrained(llava) for kind in (AutoProcessor, AutoModelForImageTextToText)
    )
    pixels = (clips[1, [2, 6]] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(x) for x in pixels]
    inputs = processor(
        images=images,
        text="<user> <image> <image> is it red star ? <assistant>",
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    ids = processor.tokenizer.convert_tokens_to_ids(["Yes", "yes", "No", "no"])
    yes, no = logits[ids].view(2, 2).logsumexp(1)
    torch.testing.assert_close(score, (yes - no)[None], atol=1e-5, rtol=1e-5)


def test_it_sees_clip_and_prompt_the_same_each_time_and_one_by_one(llava, clips):
    text = f"brightness + 2 * vlm_yes('{llava}', 'is it {{prompt}} ?')"
    judge, prompts = parse(text), ["red star", "blue circle", "red circle is the star"]
    scores = judge(clips, prompts)
    assert torch.equal(judge(clips, prompts), scores)
    assert torch.equal(
        torch.cat([judge(clips[i : i + 1], prompts[i : i + 1]) for i in range(3)]), scores
    )
    assert (judge(clips[[1, 1, 1]], prompts).diff() != 0).all()
    assert (judge(clips, prompts[:1] * 3).diff() != 0).all()
    assert judge.fingerprint == parse(text).fingerprint != parse(text.replace("?", "")).fingerprint
    assert judge(clips[:, :1], prompts).isfinite().all()  # one frame of the eight
    assert check(judge).passed
    assert not judge.differentiable


def test_what_is_no_such_judge_is_named(llava, tmp_path):
    with pytest.raises(ValueError, match="num_frames of vlm_yes must be at least 1, got 0"):
        rewards.vlm_yes(llava, num_frames=0)
    with pytest.raises(FileNotFoundError, match=r"no/such .*(?s:.*)vlm_yes\('/path/to/such'\)"):
        rewards.vlm_yes("no/such")
    for file in llava.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no chat template: use an instruction-tuned"):
        rewards.vlm_yes(tmp_path)
    with pytest.raises(ValueError, match="begins yes and no with the same token"):
        from vader_nb.rewards.vlm import first_tokens

        first_tokens(lambda word, **_: {"input_ids": [0, len(word)]})


def test_a_model_that_says_yes_more_loudly_scores_higher(llava, clips):
    judge, seen = rewards.vlm_yes(llava, "is it {prompt} ?"), []
    head = judge.model.get_output_embeddings()
    head.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0][0, -1]))
    before = judge(clips[:1], ["star"])
    with torch.no_grad():
        head.weight[judge.answers[0]] += seen[0] / seen[0].norm()
    torch.testing.assert_close(judge(clips[:1], ["star"]) - before, seen[0].norm()[None])
