"""The endpoint judge against a server in this process that is slow, busy, broken or rude, as told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pnlac_fast.errors import Interrupted, UserError
from pnlac_fast.judges import open_judge
from pnlac_fast.judges.endpoint import KEY, Endpoint

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"model": "served-7b", "choices": [{"message": message}]}).encode()


class Server:
    """Answers each request with what ``reply(number of the request, answer to be labelled)`` returns."""

    def __init__(self) -> None:
        self.reply: Callable[[int, str], Reply] = lambda number, answer: completion(
            "right" if "tax" in answer else "left"
        )
        self.seen: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.under_way = self.most = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.seen.append((body, dict(self.headers)))
                    number = len(server.seen)
                    server.under_way += 1
                    server.most = max(server.most, server.under_way)
                found = re.search(r"<answer>\n(.*)\n</answer>", body["messages"][1]["content"], re.DOTALL)
                assert found
                status, headers, content = server.reply(number, found[1])
                with lock:
                    server.under_way -= 1
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the judge no longer waits

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(KEY, raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def judge(server: Server, tmp_path: Path) -> Endpoint:
    return Endpoint("m", server.url, attempts=4, timeout=5.0, backoff=0.01, cache_dir=tmp_path / "kept")


ANSWERS, ASKED = ["cut tax", "help all", "tax less"], ["tax ?", "help ?", "tax ?"]


def test_labels_come_once_and_are_kept(server: Server, judge: Endpoint) -> None:
    assert judge.label([*ANSWERS, "cut tax"], [*ASKED, "tax ?"]).tolist() == [1, -1, 1, 1]
    assert len(server.seen) == 3
    assert {body["model"] for body, _ in server.seen} == {"m"}
    assert all(body["temperature"] == 0 and "Authorization" not in headers for body, headers in server.seen)
    again = open_judge("openai:m", url=server.url, cache_dir=judge.cache_dir)
    assert again.label(ANSWERS, ASKED).tolist() == [1, -1, 1]
    assert len(server.seen) == 3
    open_judge("openai:n", url=server.url, cache_dir=judge.cache_dir).label(ANSWERS[:1], ASKED[:1])
    judge.label(["cut tax"], ["another question ?"])
    assert len(server.seen) == 5  # another model, or another question, is another request


def test_the_judge_learns_question_and_answer_only(server: Server, judge: Endpoint) -> None:
    judge.label(["cut tax"], ["what ?"])
    sent = json.dumps(server.seen[0][0]["messages"])
    assert "what ?" in sent
    assert "cut tax" in sent
    assert [m["role"] for m in server.seen[0][0]["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"Retry-After": "0"}, b"slow down"),
        (429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}, b""),
        (429, {"Retry-After": "soon"}, b""),
        (500, {}, b"oops"),
        (503, {}, b""),
        (200, {}, b"<html>proxy</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"\xff\xfe"),
    ],
)
def test_trouble_that_passes_is_waited_out(server: Server, judge: Endpoint, trouble: Reply) -> None:
    server.reply = lambda number, answer: trouble if number <= 2 else completion("left")
    assert judge.label(["x"], ["q ?"]).tolist() == [-1]
    assert len(server.seen) == 3


def test_a_slow_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    def slow(number: int, answer: str) -> Reply:
        if number == 1:
            time.sleep(0.6)
        return completion("left")

    server.reply = slow
    judge = Endpoint("m", server.url, timeout=0.2, backoff=0.01, cache_dir=tmp_path)
    assert judge.label(["x"], ["q ?"]).tolist() == [-1]
    assert len(server.seen) >= 2


def test_trouble_that_stays_can_be_resumed(server: Server, judge: Endpoint) -> None:
    server.reply = lambda number, answer: completion("left") if "tax" in answer else (503, {}, b"")
    one_by_one = Endpoint("m", server.url, attempts=2, backoff=0.01, concurrency=1, cache_dir=judge.cache_dir)
    with pytest.raises(Interrupted, match=r"in 2 tries \(HTTP 503\).* 1 of 2 replies are kept"):
        one_by_one.label(ANSWERS[:2], ASKED[:2])
    server.reply = lambda number, answer: completion("left")
    before = len(server.seen)
    assert one_by_one.label(ANSWERS, ASKED).tolist() == [-1, -1, -1]
    assert len(server.seen) == before + 2
    unreachable = Endpoint("m", "http://127.0.0.1:9", attempts=2, backoff=0.01, cache_dir=judge.cache_dir)
    with pytest.raises(Interrupted, match="refused"):
        unreachable.label(["new"], ["q ?"])


def test_replies_without_a_label_are_not_guessed(server: Server, judge: Endpoint) -> None:
    replies = {"a": "I am sorry, I can't help with that.", "b": None, "c": "zxcv", "d": '{"label": "neither"}'}
    filtered = (400, {}, b'{"error": {"code": "content_filter"}}')
    server.reply = lambda number, answer: filtered if answer == "e" else completion(replies[answer])
    found = judge.label(list("abcde"), ["q ?"] * 5)
    assert np.array_equal(found, [np.nan, np.nan, np.nan, 0, np.nan], equal_nan=True)
    judge.label(list("abcde"), ["q ?"] * 5)
    assert len(server.seen) == 5  # these replies are kept too


def test_settings_that_a_model_does_not_take_are_left_out(server: Server, judge: Endpoint) -> None:
    def strict(number: int, answer: str) -> Reply:
        for name in ("temperature", "max_tokens"):
            if name in server.seen[number - 1][0]:
                return 400, {}, f'{{"error": {{"message": "Unsupported parameter: {name}"}}}}'.encode()
        return completion("left")

    server.reply = strict
    one_by_one = Endpoint("m", server.url, concurrency=1, cache_dir=judge.cache_dir)
    assert one_by_one.label(ANSWERS, ASKED).tolist() == [-1, -1, -1]
    assert len(server.seen) == 2 + 3


def test_what_the_user_can_mend_ends_the_run(server: Server, judge: Endpoint) -> None:
    for status, said in ((401, "check its key"), (404, "--judge-url"), (400, "refused the request: no such thing")):
        server.reply = lambda number, answer, status=status: (status, {}, b"no such thing")  # type: ignore[misc]
        with pytest.raises(UserError, match=said):
            judge.label(["x"], ["q ?"])
    server.reply = lambda number, answer: (302, {"Location": "http://127.0.0.1:9/"}, b"")
    with pytest.raises(UserError, match="HTTP 302"):
        judge.label(["x"], ["q ?"])


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Server, judge: Endpoint, tmp_path: Path, monkeypatch
) -> None:
    secret = "sk-a-secret"
    monkeypatch.setenv(KEY, secret)
    judge.label(["x"], ["q ?"])
    assert server.seen[0][1]["Authorization"] == f"Bearer {secret}"
    kept = "".join(file.read_text() for file in tmp_path.rglob("*.json"))
    server.reply = lambda number, answer: (401, {}, f"Incorrect API key: {secret}".encode())
    with pytest.raises(UserError) as raised:
        judge.label(["y"], ["q ?"])
    assert "[key]" in str(raised.value)
    for said in (kept, str(raised.value), repr(judge), json.dumps(judge.provenance)):
        assert secret not in said
    for url in ("https://me:pass@host/v1", "https://host/v1?key=1"):
        with pytest.raises(UserError, match=KEY):
            Endpoint("m", url)
    with pytest.raises(UserError, match="must look like"):
        Endpoint("m", "host/v1")


def test_the_key_of_openai_is_for_openai(server: Server, judge: Endpoint, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-secret")
    judge.label(["x"], ["q ?"])
    assert "Authorization" not in server.seen[0][1]
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        Endpoint("m", cache_dir=tmp_path).label(["never sent"], ["q ?"])


def test_so_many_requests_at_a_time(server: Server, judge: Endpoint) -> None:
    together = threading.Barrier(3, timeout=10)

    def wait(number: int, answer: str) -> Reply:
        together.wait()  # answers nobody until three are there
        return completion("left")

    server.reply = wait
    three = Endpoint("m", server.url, concurrency=3, cache_dir=judge.cache_dir)
    assert three.label([str(i) for i in range(12)], ["q ?"] * 12).tolist() == [-1] * 12
    assert server.most == 3


def test_the_cost_is_known_before(server: Server, judge: Endpoint) -> None:
    judge.label(ANSWERS[:1], ASKED[:1])
    found = judge.estimate([*ANSWERS, *ANSWERS], [*ASKED, *ASKED], price=(2.0, 8.0))
    assert (found["answers"], found["kept"], found["requests"]) == (6, 1, 2)
    assert found["output_tokens_at_most"] == 2 * judge.tokens
    assert found["cost_at_most"] == pytest.approx((2 * found["input_tokens"] + 8 * 2 * judge.tokens) / 1e6)
    judge.label(ANSWERS, ASKED)
    sent = sum(len(m["content"]) for body, _ in server.seen[1:] for m in body["messages"])
    assert found["input_characters"] == sent
    assert judge.estimate(ANSWERS, ASKED)["requests"] == 0


def test_a_spoilt_reply_on_disk_is_named(judge: Endpoint, tmp_path: Path) -> None:
    judge.label(["x"], ["q ?"])
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")
    with pytest.raises(UserError, match="remove it"):
        judge.label(["x"], ["q ?"])
    assert not list(tmp_path.rglob("*.draft"))
