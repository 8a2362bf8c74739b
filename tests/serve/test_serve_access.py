"""Who may ask a server: names, origins, token, key, and what every answer's headers say."""

import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("fastapi")

from engram_lm.errors import ConfigError
from engram_lm.serve.access import Access
from engram_lm.serve.http_errors import Refusal
from serve_support import served

KEY = "a-key-of-sixteen-or-more"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with served(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with a key."""
    access = Access.of("0.0.0.0", key=KEY, names=["demo.example"])
    with served(tmp_path_factory.mktemp("locked"), access=access, tables=False) as found:
        yield found


# ---- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "demo.example", ""])
def test_others_may_not_be_reached_without_a_key(host):
    with pytest.raises(ConfigError, match="--key"):
        Access.of(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.0.0.5"])
def test_this_machine_alone_needs_no_key(host):
    assert host.strip("[]") in Access.of(host).names


@pytest.mark.parametrize("key", ["", "short", "fifteen-letters", "ключ-ключ-ключ-ключ", "a\nb" * 10])
def test_a_key_is_long_and_plain(key):
    with pytest.raises(ConfigError, match="at least 16"):
        Access.of("0.0.0.0", key=key)


def test_every_start_draws_another_token():
    assert len({Access().token for _ in range(4)} | {Access().session for _ in range(4)}) == 8


# ---- names and origins ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["127.0.0.1:7860", "localhost", "LOCALHOST:80", "[::1]:7860", "127.0.0.1", "[::1]"]
)
def test_own_names_are_answered(host):
    access = Access.of("127.0.0.1")
    access.check_names(host=host, origin=None)
    access.check_names(host=host, origin=f"http://{host}", site="same-origin")
    access.check_names(host=host, origin=f"https://{host}", site="none")


@pytest.mark.parametrize(
    "host",
    [
        None, "", "evil.example", "evil.example:7860", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "127.0.0.2",
        "localhost.", "127.0.0.1:x", "127.0.0.1,evil.example", "[::1", "１２７.0.0.1", "0x7f.1", "a b",
    ],
)  # fmt: skip
def test_other_names_are_not(host):
    with pytest.raises(Refusal, match="does not answer") as told:
        Access.of("127.0.0.1").check_names(host=host, origin=None)
    assert told.value.status == 403


@pytest.mark.parametrize(
    "origin",
    [
        "null", "", "http://evil.example", "http://127.0.0.1:7861", "http://localhost:7860", "file://127.0.0.1:7860",
        "http://127.0.0.1:7860@evil.example", "http://[", "http://evil.example/127.0.0.1:7860",
    ],
)  # fmt: skip
def test_other_origins_are_not(origin):
    with pytest.raises(Refusal, match="another site"):
        Access.of("127.0.0.1").check_names(host="127.0.0.1:7860", origin=origin)


def test_a_server_for_others_answers_to_its_names():
    access = Access.of("0.0.0.0", key=KEY, names=["Demo.Example"])
    access.check_names(host="demo.example:7860", origin="https://demo.example:7860")
    with pytest.raises(Refusal):
        access.check_names(host="other.example", origin=None)


# ---- a whole request --------------------------------------------------------------------------------------------------


def test_wrong_name_origin_and_token_are_refused_before_anything_else(site):
    body = {"text": "a"}
    token = {"x-engram-token": site.access.token}
    post = site.client.post
    assert post("/api/trace", json=body, headers=token).status_code == 200
    for headers in (
        {},
        {"x-engram-token": "wrong"},
        {"x-engram-token": ""},
        {"authorization": f"Bearer {site.access.token}"},
        {**token, "host": "evil.example"},
        {**token, "origin": "http://evil.example"},
        {**token, "origin": "null"},
        {**token, "sec-fetch-site": "cross-site"},
    ):
        answer = post("/api/trace", json=body, headers=headers)
        assert answer.status_code == 403, headers
        assert set(answer.json()) == {"error"}
    assert site.client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert site.client.get("/api/about", headers={"host": "evil.example"}).status_code == 403
    assert site.client.get("/api/about", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    # a link from elsewhere may lead here
    assert site.client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert site.client.request(method, "/api/trace").status_code == 405


def test_every_post_wants_the_token(site):
    paths = site.get("/api/openapi.json").json()["paths"]
    posts = [path for path, entry in paths.items() if "post" in entry]
    assert len(posts) >= 8
    for path in posts:
        assert site.client.post(path, json={}).status_code == 403, path


def test_headers_named_twice_are_refused(site):
    headers = [("x-engram-token", "wrong"), ("x-engram-token", site.access.token)]
    answer = site.client.post("/api/trace", json={"text": "a"}, headers=headers)
    assert answer.status_code == 400
    assert "twice" in answer.json()["error"]


def test_answers_forbid_frames_sniffing_and_foreign_scripts(site):
    for path in ("/", "/static/style.css", "/api/about", "/nothing"):
        headers = site.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
    refused = site.client.post("/api/trace", json={"text": "a"})
    assert "content-security-policy" in refused.headers
    assert "access-control-allow-origin" not in refused.headers


def test_the_page_holds_the_token_and_nothing_from_elsewhere(site):
    page = site.get("/")
    assert page.headers["cache-control"] == "no-store"
    assert f'content="{site.access.token}"' in page.text
    assert "{{" not in page.text
    names = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert names
    for name in names:
        assert name.startswith("/static/"), name
        answer = site.get(name)
        assert answer.status_code == 200, name
        tag = answer.headers["etag"]
        assert site.get(name, **{"if-none-match": tag}).status_code == 304
    assert not re.findall(r"<script(?![^>]*src=)|\son\w+=|style=", page.text), "no inline scripts or styles"


# ---- with a key -------------------------------------------------------------------------------------------------------


def test_without_the_key_there_is_the_form_and_nothing_else(locked):
    page = locked.get("/")
    assert page.status_code == 200
    assert 'type="password"' in page.text
    assert locked.access.token not in page.text
    assert locked.get("/static/style.css").status_code == 200
    for path in ("/api/about", "/api/health", "/api/openapi.json", "/static/start.js", "/api/quiz"):
        answer = locked.get(path)
        assert answer.status_code == 401, path
        assert "/login" in answer.json()["error"]
    assert locked.post("/api/trace", {"text": "a"}).status_code == 401


def test_a_script_sends_the_key(locked):
    bearer = {"authorization": f"Bearer {KEY}"}
    assert locked.get("/api/health", **bearer).status_code == 200
    answer = locked.client.post("/api/trace", json={"text": "a"}, headers=bearer)
    assert answer.status_code == 200
    wrong = {"authorization": f"Bearer {KEY}x"}
    assert locked.client.post("/api/trace", json={"text": "a"}, headers=wrong).status_code == 401


def test_a_browser_logs_in(locked, monkeypatch):
    monkeypatch.setattr("engram_lm.serve.app.WRONG_KEY_SECONDS", 0.01)
    client = locked.client
    wrong = client.post("/login", data={"key": "wrong"})
    assert wrong.status_code == 401
    assert "not the key" in wrong.text
    assert "engram_session" not in client.cookies
    assert client.post("/login", data={"key": "w" * 5000}).status_code == 413
    # with no-referrer a browser sends the form's Origin as null
    assert client.get("/login").headers["referrer-policy"] == "same-origin"
    elsewhere = client.post("/login", data={"key": KEY}, headers={"origin": "http://evil.example"})
    assert elsewhere.status_code == 403
    right = client.post("/login", data={"key": KEY}, follow_redirects=False)
    assert right.status_code == 303
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert KEY not in cookie
    try:
        assert locked.access.token in client.get("/").text
        # the cookie is sent by the browser on its own, so the token is wanted beside it
        assert client.post("/api/trace", json={"text": "a"}).status_code == 403
        assert locked.post("/api/trace", {"text": "a"}).status_code == 200
    finally:
        client.cookies.clear()
    assert client.get("/api/about", headers={"cookie": "engram_session=wrong"}).status_code == 401
