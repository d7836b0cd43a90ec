"""The HTTP API, with checkpoints that generate a known text."""

import concurrent.futures
import json
import shutil
import socket
import threading
import time
from typing import Any

import httpx
import pytest
import torch

from tests.serve.servers import ENDLESS, reciting, running, tiny, train_tokenizer, wait_until, write_answering, write_checkpoint
from tritale.inference import LLM, Decoder, Detokenizer, native
from tritale.stories.generator import story as tell

CHARACTERS = "从前有一只小兔子和猫在森林里玩，天气很好。妈妈说：“你看！”🐰龘x1 "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A run with three checkpoints and one that is being written."""
    folder = tmp_path_factory.mktemp("serve") / "run"
    for step in (100, 1000):
        write_checkpoint(folder / f"step-{step:08d}", tokenizer, reciting(tokenizer, ENDLESS, is_endless=True))
    write_checkpoint(folder / "step-00000900", tokenizer, tiny(tokenizer))
    write_checkpoint(folder / ".step-00002000.0123abcd.tmp", tokenizer, tiny(tokenizer))
    (folder / "step-00003000").mkdir()
    (folder / "tokenizer").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(run):
    with running(run) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client
    wait_until(lambda: server.engine.status()["running"] == server.engine.status()["waiting"] == 0)


@pytest.fixture
def slow(monkeypatch):
    """Each step takes at least 10 ms, as with a larger model, so that requests overlap."""
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self: (time.sleep(0.01), step(self))[1])


def ask(client, **body) -> dict:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error(response) -> dict:
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def events(response) -> list:
    """The data of server-sent events."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def random_prompts(n: int) -> list[str]:
    return ["".join(CHARACTERS[j] for j in torch.randint(len(CHARACTERS), (int(torch.randint(1, 20, ())),)).tolist()) for _ in range(n)]


# --- completions ---------------------------------------------------------------------------------------------------------------------


def test_greedy_text_is_that_of_LLM_generate(client, run):
    prompts, llm = ["", *random_prompts(5)], LLM.load(run / "step-00000900", device="cpu")
    expected = llm.complete(prompts, temperature=0, max_new_tokens=40)
    answer = ask(client, model="step-00000900", prompt=prompts, temperature=0, max_tokens=40)
    assert [c["text"] for c in answer["choices"]] == [c.text for c in expected]
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    reasons = {"end": "stop", "length": "length"}
    assert [c["finish_reason"] for c in answer["choices"]] == [reasons[c.finish_reason] for c in expected]
    n_prompt, n_written = sum(len(llm.encode_prompt(p)) for p in prompts), sum(len(c.tokens) for c in expected)
    assert answer["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": n_written, "total_tokens": n_prompt + n_written}
    assert answer["model"] == "step-00000900" and answer["object"] == "text_completion"
    for prompt, completion in zip(prompts[:2], expected, strict=False):
        assert ask(client, model="step-00000900", prompt=prompt, temperature=0, max_tokens=40)["choices"][0]["text"] == completion.text


def test_sampled_texts_draw_with_seed_plus_their_index(client, run, seed):
    prompts, llm = random_prompts(2), LLM.load(run / "step-00000900", device="cpu")
    settings: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    answer = ask(client, model="step-00000900", prompt=prompts, n=3, seed=seed, max_tokens=20, top_k=0, **settings)
    expected = llm.complete([p for p in prompts for _ in range(3)], seed=seed, max_new_tokens=20, top_k=None, **settings)
    assert [c["text"] for c in answer["choices"]] == [c.text for c in expected]
    assert len({c.text for c in expected}) > 2
    assert answer["usage"]["prompt_tokens"] == sum(len(llm.encode_prompt(p)) for p in prompts)  # not times n


def test_omitted_fields_have_the_defaults_of_Sampling(client, run, seed):
    answer = ask(client, model="step-00000900", prompt="小兔", seed=seed)
    assert answer["choices"][0]["text"] == LLM.load(run / "step-00000900", device="cpu").generate("小兔", seed=seed)
    assert ask(client, max_tokens=1)["model"] == "step-00001000"


def test_stream_joins_to_the_same_completion(client, seed):
    body = {"model": "step-00000900", "prompt": random_prompts(2), "n": 2, "seed": seed, "max_tokens": 60, "temperature": 1.0}
    complete = ask(client, **body)
    with client.stream("POST", "/v1/completions", json=body | {"stream": True, "stream_options": {"include_usage": True}}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response)
    chunks = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]" and chunks[-1]["usage"] == complete["usage"] and chunks[-1]["choices"] == []
    texts, reasons = [""] * 4, [None] * 4
    for chunk in chunks[:-1]:
        assert chunk["id"] == chunks[0]["id"] and len(chunk["choices"]) == 1
        choice = chunk["choices"][0]
        assert reasons[choice["index"]] is None  # nothing follows the last piece
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [c["text"] for c in complete["choices"]] and reasons == [c["finish_reason"] for c in complete["choices"]]
    assert len(chunks) > 40  # in pieces


def test_a_completion_ends_before_a_stop_string(client):
    for stop, expected in (
        (["狗", "一只"], "从前有"),
        ("小兔从", "从前有一只"),
        (ENDLESS, ""),
        ([ENDLESS * 2 + "狗", "兔从"], "从前有一只小"),
    ):
        choice = ask(client, prompt="", stop=stop, temperature=0, max_tokens=100)["choices"][0]
        assert choice["text"] == expected and choice["finish_reason"] == "stop"
    choice = ask(client, prompt="", stop="狗", temperature=0, max_tokens=40)["choices"][0]
    assert choice["finish_reason"] == "length" and choice["text"].startswith(ENDLESS * 2)


def test_a_completion_ends_when_the_context_is_full(client, tokenizer):
    answer = ask(client, prompt=ENDLESS * 30, temperature=0, max_tokens=2000)
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 512


# --- concurrent requests -------------------------------------------------------------------------------------------------------------


def test_concurrent_requests_are_batched(client, server, slow):
    lengths = [20 + 5 * i for i in range(16)]
    before = server.engine.n_steps
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: ask(client, prompt="", temperature=0, max_tokens=n), lengths))
    steps = server.engine.n_steps - before
    assert [a["usage"]["completion_tokens"] for a in answers] == lengths
    assert max(lengths) <= steps < sum(lengths) / 4, steps
    assert all((ENDLESS * 30).startswith(a["choices"][0]["text"]) for a in answers)


def test_requests_beyond_the_slots_wait_and_those_beyond_the_queue_are_refused(run, slow):
    with running(run, slots=2, queue=3) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            futures = []
            for i in range(5):
                futures.append(pool.submit(ask, client, prompt="", temperature=0, max_tokens=200 if i < 2 else 5))
                wait_until(lambda i=i: sum(server.engine.status()[k] for k in ("running", "waiting")) == i + 1)
            assert server.engine.status()["running"] == 2 and server.engine.status()["waiting"] == 3
            refused = client.post("/v1/completions", json={"prompt": ""})
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert error(refused)["type"] == "rate_limit_error" and "3 sequences wait already" in error(refused)["message"]
            assert client.get("/health").json()["waiting"] == 3
            assert [f.result()["usage"]["completion_tokens"] for f in futures] == [200, 200, 5, 5, 5]


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_its_slots(stream, server, client, slow):
    body = {"prompt": "", "temperature": 0, "max_tokens": 500, "n": 3, "stream": stream}
    before = server.engine.n_steps
    with (
        httpx.Client(base_url=server.url, timeout=120) as other,
        other.stream("POST", "/v1/completions", json=body) if stream else open_post(server, body),
    ):
        wait_until(lambda: server.engine.status()["running"] == 3)
    wait_until(lambda: server.engine.status()["running"] == 0)
    assert server.engine.n_steps - before < 450  # they were cancelled, not finished


def open_post(server, body: dict) -> socket.socket:
    """Send a request without reading the response."""
    host, port = server.url.removeprefix("http://").split(":")
    connection, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_a_disconnected_client_is_removed_from_the_queue(run, slow):
    with running(run, slots=1, queue=2) as server, open_post(server, {"max_tokens": 500, "temperature": 0}):
        wait_until(lambda: server.engine.status()["running"] == 1)
        with open_post(server, {"max_tokens": 500, "temperature": 0, "stream": True}):
            wait_until(lambda: server.engine.status()["waiting"] == 1)
        wait_until(lambda: server.engine.status()["waiting"] == 0)
        assert server.engine.status()["running"] == 1


def test_unfinished_requests_get_an_error_when_the_server_stops(run, slow):
    with running(run) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(client.post, "/v1/completions", json={"max_tokens": 500, "temperature": 0})
            wait_until(lambda: server.engine.status()["running"] == 1)
            server.engine.stop()
            assert future.result().status_code == 503 and error(future.result())["message"] == "the server is stopping"
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={}).status_code == 503


def test_a_step_that_fails_ends_its_requests_and_not_the_server(client, server, monkeypatch):
    def fail(self):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "step", fail)
        response = client.post("/v1/completions", json={"max_tokens": 5})
    assert response.status_code == 500 and "out of memory" in error(response)["message"] and error(response)["type"] == "server_error"
    assert ask(client, prompt="", max_tokens=7, temperature=0)["choices"][0]["text"]


@pytest.mark.parametrize("place", ["__init__", "push"])
def test_a_detokenizer_that_fails_ends_its_request_and_not_the_server(place, client, monkeypatch):
    def fail(*args):
        raise KeyError(4096)

    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, place, fail)
        response = client.post("/v1/completions", json={"max_tokens": 5, "n": 2})
    assert response.status_code == 500 and "4096" in error(response)["message"]
    assert ask(client, prompt="", max_tokens=7, temperature=0)["choices"][0]["text"]


def test_long_prompts_do_not_stall_the_others(tmp_path, tokenizer, monkeypatch):
    """Each step processes a limited number of prompt tokens, and a short prompt does not wait for long ones."""
    if native.problem():
        pytest.skip("on the PyTorch path prompts are not divided")
    monkeypatch.setattr("tritale.inference.cpu_runner.PREFILL_WORK", 1)  # 8 tokens a step, the minimum
    folder, passes = tmp_path / "run", []
    write_checkpoint(folder / "step-00000001", tokenizer, tiny(tokenizer))
    forward = native.NativeForward.__call__
    monkeypatch.setattr(
        native.NativeForward, "__call__", lambda self, tokens, *args: (passes.append(len(tokens)), forward(self, tokens, *args))[1]
    )
    prompts = ["小兔" * 100 + str(i) for i in range(8)] + ["猫"]
    llm = LLM.load(folder, device="cpu")
    expected = [c.text for c in llm.complete(prompts, temperature=0, max_new_tokens=10)]
    passes.clear()
    with running(folder, slots=10) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        answer = ask(client, prompt=prompts, temperature=0, max_tokens=10)
    assert [c["text"] for c in answer["choices"]] == expected
    assert max(passes) <= 8 + len(prompts) and len(passes) > 100


def test_a_free_slot_goes_to_the_request_with_the_fewest_running_sequences(run, slow):
    with running(run, slots=2, queue=20) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            large = []
            for n_waiting in (0, 2):
                large.append(pool.submit(ask, client, prompt=["", ""], temperature=0, max_tokens=100))
                wait_until(lambda n=n_waiting: server.engine.status()["running"] == 2 and server.engine.status()["waiting"] == n)
            before = server.engine.n_steps
            ask(client, prompt="", temperature=0, max_tokens=5)
            assert server.engine.n_steps - before < 130  # not after all four
            assert all(f.result()["usage"]["completion_tokens"] == 200 for f in large)


def test_a_checkpoint_that_waits_for_a_place_does_not_block_the_others(run, slow):
    newest, middle, oldest = "step-00001000", "step-00000900", "step-00000100"
    with running(run) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(ask, client, model=newest, prompt="", temperature=0, max_tokens=400)]
            futures.append(pool.submit(ask, client, model=oldest, prompt="", temperature=0, max_tokens=150))
            wait_until(lambda: server.engine.status()["running"] == 2)
            futures.append(pool.submit(ask, client, model=middle, prompt="", max_tokens=2))
            wait_until(lambda: server.engine.status()["waiting"] == 1)
            ask(client, model=newest, max_tokens=3)  # while the third checkpoint waits for `oldest`
            assert server.engine.status()["waiting"] == 1 and server.engine.status()["running"] == 2
            assert [f.result()["usage"]["completion_tokens"] for f in futures[:2]] == [400, 150]
            assert futures[2].result()["model"] == middle


def test_loading_a_checkpoint_does_not_stall_the_others(run, slow, monkeypatch):
    newest, oldest = "step-00001000", "step-00000100"
    with running(run) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        load, may_load = LLM.load, threading.Event()
        monkeypatch.setattr(LLM, "load", lambda *args, **kwargs: (may_load.wait(60), load(*args, **kwargs))[1])
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(ask, client, model=oldest, max_tokens=2)
            wait_until(lambda: server.engine.status()["waiting"] == 1)
            ask(client, model=newest, max_tokens=3)
            assert server.engine.status()["waiting"] == 1
            may_load.set()
            assert future.result()["model"] == oldest


def test_half_open_connections_are_closed(server, client, monkeypatch):
    monkeypatch.setattr("tritale.serve.connections.HEAD_SECONDS", 0.3)
    host, port = server.url.removeprefix("http://").split(":")
    opened = [socket.create_connection((host, int(port)), timeout=30) for _ in range(20)]
    opened.append(open_post(server, {"max_tokens": 300, "temperature": 0}))  # a request that takes longer
    try:
        for i, connection in enumerate(opened[:-1]):
            connection.sendall([b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /he"][i % 3])
        for connection in opened[:-1]:
            while connection.recv(1000):
                pass
        assert opened[-1].recv(12) == b"HTTP/1.1 200"
    finally:
        for connection in opened:
            connection.close()


def test_an_incomplete_body_is_refused_and_a_disconnected_client_is_no_error(server, client, monkeypatch, caplog):
    monkeypatch.setattr("tritale.serve.app.BODY_SECONDS", 0.3)
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 408"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
    time.sleep(0.2)
    assert ask(client, prompt="", max_tokens=1) and not caplog.records


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [1] * 80_000},
        {"stop": [1] * 80_000},
        {str(i): 1 for i in range(20_000)},
        {"logit_bias": {str(i): 1 for i in range(20_000)}},
    ],
    ids=["prompt", "stop", "unknown", "logit_bias"],
)
def test_a_large_body_of_wrong_types_is_refused_quickly(body, client):
    content = json.dumps(body)
    assert 180_000 < len(content) < 262_144
    client.get("/health")
    began = time.process_time()  # of the server too, which runs in this process
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and len(response.content) < 1000
    assert time.process_time() - began < 0.15


# --- checkpoints ---------------------------------------------------------------------------------------------------------------------


def test_complete_checkpoints_are_listed_newest_first(client):
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [m["id"] for m in models["data"]] == ["step-00001000", "step-00000900", "step-00000100"]
    assert client.get("/v1/models/step-00000100").json() == models["data"][2]
    for name in ("step-00003000", ".step-00002000.0123abcd.tmp", "tokenizer", "..", "/etc/passwd", ""):
        response = client.post("/v1/completions", json={"model": name, "prompt": ""})
        assert response.status_code == 404 and error(response)["code"] == "model_not_found"


def test_one_checkpoint_can_be_served_alone(run):
    with running(run / "step-00000100") as server, httpx.Client(base_url=server.url, timeout=120) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["step-00000100"]
        assert ask(client, max_tokens=3)["model"] == "step-00000100"


def test_two_checkpoints_stay_in_memory_and_a_third_waits_for_a_place(run, slow):
    newest, middle, oldest = "step-00001000", "step-00000900", "step-00000100"
    with running(run) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        loaded = lambda: client.get("/health").json()["loaded"]
        assert loaded() == [newest]
        ask(client, model=oldest, max_tokens=2)
        assert loaded() == [oldest, newest]
        ask(client, model=newest, max_tokens=2)
        ask(client, model=middle, max_tokens=2)  # replaces the least recently used
        assert loaded() == [middle, newest]
        endless = {"prompt": "", "temperature": 0}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(ask, client, model=newest, **endless, max_tokens=300)]
            wait_until(lambda: server.engine.status()["running"] == 1)
            ask(client, model=oldest, max_tokens=2)  # replaces the idle one
            assert loaded() == [oldest, newest] and server.engine.status()["running"] == 1
            futures.append(pool.submit(ask, client, model=oldest, **endless, max_tokens=100))
            wait_until(lambda: server.engine.status()["running"] == 2)
            ask(client, model=middle, max_tokens=2)  # waits until the requests for `oldest` are finished
            assert loaded()[0] == middle and server.engine.status()["running"] == 1
            for future, n in zip(futures, (300, 100), strict=True):
                assert future.result()["usage"]["completion_tokens"] == n
                assert future.result()["choices"][0]["text"].startswith(ENDLESS)


def test_checkpoints_come_go_and_change_while_the_server_runs(tmp_path, tokenizer):
    folder = tmp_path / "run"
    write_checkpoint(folder / "step-00000001", tokenizer, reciting(tokenizer, "从前"))
    with running(folder) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        greedy = lambda **body: ask(client, temperature=0, max_tokens=9, **body)["choices"][0]["text"]
        assert greedy() == "从前"
        write_checkpoint(folder / "step-00000002", tokenizer, reciting(tokenizer, "小兔"))
        assert greedy() == "小兔" and greedy(model="step-00000001") == "从前"
        shutil.rmtree(folder / "step-00000002")  # a resumed run writes this step again
        write_checkpoint(folder / "step-00000002", tokenizer, reciting(tokenizer, "妈妈"))
        assert greedy() == "妈妈"
        shutil.rmtree(folder / "step-00000001")
        assert client.post("/v1/completions", json={"model": "step-00000001"}).status_code == 404
        (folder / "step-00000002" / "model.safetensors").write_bytes(b"damaged")
        response = client.post("/v1/completions", json={"model": "step-00000002"})
        assert response.status_code == 500 and "damaged" in error(response)["message"]


def test_a_damaged_checkpoint_does_not_affect_the_others(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "run"
    write_checkpoint(folder / "step-00000003", tokenizer, reciting(tokenizer, "从前"))
    not_finite = tiny(tokenizer)
    not_finite.embedding.data *= torch.nan
    write_checkpoint(folder / "step-00000002", tokenizer, not_finite)
    write_checkpoint(folder / "step-00000001", tokenizer, tiny(tokenizer))
    (folder / "step-00000001" / "config.json").write_text("[]")
    with running(folder) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        for name, message in (("step-00000002", "weights hold NaN"), ("step-00000001", "config.json holds a list"), ("fault", "fault")):
            if name == "fault":
                name = "step-00000001"
                monkeypatch.setattr(LLM, "load", lambda *args, **kwargs: {}["fault"])
            for temperature in (0, 1):
                response = client.post("/v1/completions", json={"model": name, "temperature": temperature})
                assert response.status_code == 500 and message in error(response)["message"]
            assert ask(client, model="step-00000003", temperature=0)["choices"][0]["text"] == "从前"


# --- bad input -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body, status, param, message",
    [
        ({"prompt": "小兔子" * 1000}, 400, "prompt", "shorten it to 511"),
        ({"prompt": ["小兔", "小兔子" * 1000], "stream": True}, 400, "prompt", "shorten it to 511"),
        ({"prompt": []}, 400, "prompt", "at least one prompt"),
        ({"prompt": [1, 2]}, 400, "prompt", "string"),
        ({"prompt": 3}, 400, "prompt", "string"),
        ({"prompt": "小" * 100_000}, 413, None, "262144 bytes"),
        ({"max_tokens": 2049}, 400, "max_tokens", "at most 2048"),
        ({"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        ({"max_tokens": "5"}, 400, "max_tokens", "integer"),
        ({"temperature": -0.1}, 400, "temperature", "-0.1"),
        ({"top_p": -0.1}, 400, "top_p", "-0.1"),
        ({"top_p": 1.5}, 400, "top_p", "1.5"),
        ({"top_k": -2}, 400, "top_k", "-2"),
        ({"n": 17}, 400, "n", "limit of 16"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 9, "prompt": ["", ""]}, 400, "n", "limit of 16"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"stop": ["x"] * 17}, 400, "stop", "at most 16"),
        ({"stop": "x" * 201}, 400, "stop", "200 characters"),
        ({"stop": ""}, 400, "stop", "none of them empty"),
        ({"logprobs": 3}, 400, None, "logprobs is 3, which this server does not support"),
        ({"echo": True}, 400, None, "echo"),
        ({"temprature": 1}, 400, "temprature", "not permitted"),
        ({"model": "step-00000007"}, 404, "model", "step-00000007"),
        ([], 400, None, "object"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict | list) else None,
)
def test_bad_input_gives_openais_error_object(body, status, param, message, client):
    response = client.post("/v1/completions", json=body)
    found = error(response)
    assert response.status_code == status and found["param"] == param and message in found["message"], found
    assert found["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


@pytest.mark.parametrize("content", [b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"temperature": NaN}', b"[" * 100_000])
def test_a_body_that_is_not_json_is_refused(content, client):
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400 and error(response)["type"] == "invalid_request_error"


def test_neutral_values_of_openais_other_fields_are_accepted(client):
    neutral = {
        "best_of": 1,
        "echo": False,
        "frequency_penalty": 0,
        "logit_bias": None,
        "logprobs": None,
        "presence_penalty": 0.0,
        "suffix": None,
    }
    assert ask(client, prompt="", max_tokens=2, user="someone", stop=None, n=None, seed=None, stream=False, **neutral)


def test_pages_of_other_sites_are_refused(client, server):
    post = lambda **headers: client.post("/v1/completions", json={"max_tokens": 1}, headers=headers)
    assert post(origin=server.url).status_code == 200
    assert post(host="localhost:8000").status_code == post(host="[::1]:8000").status_code == 200
    for headers in ({"host": "evil.example"}, {"host": "127.0.0.1.evil.example:80"}, {"host": "[evil"}, {"host": "localhost.evil.example"}):
        for response in (post(**headers), client.get("/", headers=headers), client.get("/v1/models", headers=headers)):
            assert response.status_code == 403 and error(response)["code"] == "unknown_host"
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"{server.url}.evil.example"):
        assert post(origin=origin).status_code == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "text/plain; application/json"):
        assert post(**{"content-type": kind}).status_code == 415  # a form can send these without a preflight request
    preflight = client.options("/v1/completions", headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    assert preflight.status_code >= 400 and not any(name.startswith("access-control") for name in preflight.headers)


def test_a_name_of_the_machine_can_be_allowed(run):
    with running(run, names=["Stories.example"]) as server:
        get = lambda host: httpx.get(f"{server.url}/v1/models", headers={"host": host}, timeout=120).status_code
        assert get("stories.example:8000") == 200 and get("other.example") == 403


def test_unknown_paths_and_methods_have_openais_errors(client):
    for response, status in ((client.get("/nowhere"), 404), (client.get("/v1/completions"), 405), (client.get("/v1/models/x"), 404)):
        assert response.status_code == status and error(response)["message"]
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert client.get(path).status_code == 404  # FastAPI's own pages load scripts from elsewhere


# --- OpenAI's own client -------------------------------------------------------------------------------------------------------------


def test_openais_client_works(server, run):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    assert [m.id for m in client.models.list()] == ["step-00001000", "step-00000900", "step-00000100"]
    expected = LLM.load(run / "step-00000900", device="cpu").generate("小兔", temperature=0, max_new_tokens=30)
    body = {"model": "step-00000900", "prompt": "小兔", "temperature": 0, "max_tokens": 30}
    assert client.completions.create(**body, extra_body={"top_k": 5}).choices[0].text == expected
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected and chunks[-1].usage.completion_tokens > 0
    with pytest.raises(openai.NotFoundError, match="step-7"):
        client.completions.create(model="step-7", prompt="")
    assert client.completions.create(**body | {"top_p": 0, "temperature": 1}).choices[0].text == expected
    with pytest.raises(openai.BadRequestError, match="top_p is 2"):
        client.completions.create(**body | {"top_p": 2})


# --- conversations -------------------------------------------------------------------------------------------------------------------


ANSWER = "从前有一只小兔"


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory, tokenizer):
    """A server with a model that answers ANSWER to everything."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    write_answering(folder / "step-00000001", tokenizer, ANSWER)
    with running(folder) as server:
        yield server


def test_openais_client_holds_a_conversation(chat_server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0, timeout=120)
    body = {"model": "step-00000001", "messages": [{"role": "user", "content": "写一个故事。"}], "temperature": 0}
    whole = client.chat.completions.create(**body, n=2, max_completion_tokens=50)
    assert [c.message.content for c in whole.choices] == [ANSWER] * 2 and whole.choices[0].message.role == "assistant"
    assert whole.choices[1].finish_reason == "stop" and whole.object == "chat.completion" and whole.id.startswith("chatcmpl-")
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens // 2
    short = client.chat.completions.create(**body, max_tokens=1).choices[0]
    assert short.finish_reason == "length" and ANSWER.startswith(short.message.content) and short.message.content != ANSWER
    multi = [{"role": "system", "content": "讲故事。"}, *body["messages"], {"role": "assistant", "content": "好。"}, *body["messages"]]
    assert client.chat.completions.create(**body | {"messages": multi}).choices[0].message.content == ANSWER


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is not a list of messages"),
        ([{"role": "teacher", "content": "x"}], "message 1 has the role 'teacher'; the roles are system, user, assistant"),
        ([{"role": "user", "content": "<|im_end|>"}], "message 1 contains <|im_start|>, <|im_end|>"),
        ([{"role": "user"}], "Field required"),
        ("x", "Input should be a valid array"),
        ([{"role": "user", "content": "好" * 2000}], "tokens and the model's context 512"),
    ],
)
def test_bad_messages_give_openais_error_object(messages, message, chat_server):
    response = httpx.post(f"{chat_server.url}/v1/chat/completions", json={"messages": messages}, timeout=60)
    assert response.status_code == 400 and message in error(response)["message"], response.text


def test_a_model_without_instructions_does_not_answer(client):
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "写一个故事。"}]})
    assert response.status_code == 400 and "was not trained on instructions" in error(response)["message"]
    assert error(response)["param"] == "messages"


def test_a_story_is_judged_by_what_was_required_of_it(client):
    story = "小兔在公园里笑了。小熊说：“你好！”"
    required: dict[str, bool | None] = {
        '{"kind": "words", "words": ["公园", "小兔"]}': True,
        '{"kind": "words", "words": ["公园", "苹果"]}': False,
        '{"kind": "feature", "text": "对话"}': True,
        '{"kind": "feature", "text": "坏结局"}': None,  # none of the built-in stories' sentences, which proves nothing
        '{"kind": "length", "characters": [10, 20]}': True,
        '{"kind": "sentence", "text": "小兔在公园里笑了。"}': True,
        '{"kind": "beginning", "text": "从前"}': False,
    }
    response = client.post("/judge", json={"story": story, "requirements": [json.loads(r) for r in required]})
    assert response.json() == {"is_met": list(required.values())}
    ended = next(s for s in (tell(0, i) for i in range(1000)) if "坏结局" in s.features)
    response = client.post("/judge", json={"story": ended.text, "requirements": [{"kind": "feature", "text": "坏结局"}]})
    assert response.json() == {"is_met": [True]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"requirements": []}, "Field required"),
        ({"story": "x" * 20_001, "requirements": []}, "at most 20000 characters"),
        ({"story": "", "requirements": [{"kind": "words", "words": ["好"]}] * 21}, "at most 20 items"),
        ({"story": "", "requirements": [{"kind": "weather"}]}, "weather"),
        ({"story": "", "requirements": [{"kind": "sentence", "text": "好" * 20_000}]}, "a requirement is longer than 20000 characters"),
        ({"story": "", "requirements": ["words"]}, "Input should be an object"),
    ],
)
def test_what_cannot_be_judged_gives_openais_error_object(body, message, client):
    response = client.post("/judge", json=body)
    assert response.status_code == 400 and message in error(response)["message"], response.text
