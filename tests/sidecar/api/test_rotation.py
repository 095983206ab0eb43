"""A key's life over HTTP: rotated, ended, changed, and what the audit log says of it."""

import hashlib
import json
from typing import Any

import httpx
import pytest

from keylatch.management.keyring import Created
from keylatch_sidecar.api.schemas import iso
from tests.project.test_docs import examples
from tests.sidecar.api.test_unsent import KEYS, bearer, created
from tests.support.sidecars import Sidecar

DAY_MS = 86_400_000


def is_good(client: httpx.Client, token: str, **environment: str) -> bool:
    headers = {"Authorization": f"Bearer {token}"}
    answer = client.get("/verify", params=environment, headers=headers)
    assert answer.status_code in (200, 401), answer.text
    return answer.status_code == 200


class TestRotation:
    """`/v1/api-keys/{id}/rotate`"""

    def test_it_answers_like_create_and_describes_both_secrets(
        self, client: httpx.Client, sidecar: Sidecar
    ) -> None:
        """The same key, a token this once; the old secret until its end."""
        key = created(client)
        assert is_good(client, key["token"])
        answer = client.post(f"{KEYS}/{key['id']}/rotate", json={"graceSeconds": 90})
        assert answer.status_code == 200
        assert "seq=" in answer.headers["x-keylatch-revocation"]
        assert answer.headers["cache-control"] == "no-store"
        new = answer.json()
        now_ms = int(sidecar.clock() * 1000)
        assert new["id"] == key["id"]
        assert new["token"] != key["token"]
        assert new["partialToken"] == f"kl_...{new['token'][-4:]}"
        assert new["rotatedAt"] == iso(now_ms)
        assert new["previous"] | {"lastUsed": ...} == {
            "partialToken": key["partialToken"],
            "expiresAt": iso(now_ms + 90_000),
            "lastUsed": ...,
        }
        assert is_good(client, key["token"])
        assert is_good(client, new["token"])
        shown = client.get(f"{KEYS}/{key['id']}").json()
        assert "token" not in shown
        assert shown["previous"]["expiresAt"] == new["previous"]["expiresAt"]

    def test_the_example_in_the_readme_does_it(
        self, client: httpx.Client, sidecar: Sidecar
    ) -> None:
        """Rotate, see who still uses the old secret."""
        names: dict[str, Any] = {}
        exec(next(program for program in examples() if "def rotate(" in program), names)
        key = created(client)
        token = names["rotate"](client, key["id"])
        assert is_good(client, key["token"])
        assert is_good(client, token)
        now = iso(int(sidecar.clock() * 1000))
        assert names["is_safe_to_finish"](client, key["id"], now)

    def test_the_grace_is_a_day_by_default(self, client: httpx.Client, sidecar: Sidecar) -> None:
        """Without a body, too."""
        key = created(client)
        previous = client.post(f"{KEYS}/{key['id']}/rotate").json()["previous"]
        assert previous["expiresAt"] == iso(int(sidecar.clock() * 1000) + DAY_MS)

    def test_with_none_the_old_secret_ends_at_once(self, client: httpx.Client) -> None:
        """0 seconds: one secret, and no way back."""
        key = created(client)
        new = client.post(f"{KEYS}/{key['id']}/rotate", json={"graceSeconds": 0}).json()
        assert new["previous"] is None
        assert not is_good(client, key["token"])
        assert is_good(client, new["token"])
        assert client.post(f"{KEYS}/{key['id']}/rotate/cancel").status_code == 400

    @pytest.mark.parametrize("word", ["cancel", "finish"])
    def test_it_can_be_ended_either_way(self, client: httpx.Client, word: str) -> None:
        """Cancelled: the old secret stays. Finished: the new one alone."""
        key = created(client)
        new = client.post(f"{KEYS}/{key['id']}/rotate").json()
        answer = client.post(f"{KEYS}/{key['id']}/rotate/{word}")
        assert answer.status_code == 200
        assert "token" not in answer.json()
        assert answer.json()["previous"] is None
        assert is_good(client, key["token"]) == (word == "cancel")
        assert is_good(client, new["token"]) == (word == "finish")

    @pytest.mark.parametrize("word", ["rotate", "rotate/cancel", "rotate/finish"])
    def test_only_keys_of_ones_own_that_live(
        self, client: httpx.Client, sidecar: Sidecar, word: str
    ) -> None:
        """Foreign, unknown and malformed ids are the same 404; a deleted key stays deleted."""
        other_id = sidecar.create().record.id
        bodies = set()
        for key_id in (other_id, "key_unknown", "x" * 65, "%21"):
            answer = client.post(f"{KEYS}/{key_id}/{word}")
            assert answer.status_code == 404
            bodies.add(answer.content)
        assert len(bodies) == 1
        key = created(client)
        client.delete(f"{KEYS}/{key['id']}")
        assert client.post(f"{KEYS}/{key['id']}/{word}").status_code == 400

    @pytest.mark.parametrize("seconds", [-1, 1e9, "60", None, 1.5, True])
    def test_a_grace_is_a_number_of_seconds(self, client: httpx.Client, seconds: Any) -> None:
        """Anything else is refused, and the key is as it was."""
        key = created(client)
        answer = client.post(f"{KEYS}/{key['id']}/rotate", json={"graceSeconds": seconds})
        assert answer.status_code == 400
        assert "graceSeconds" in answer.json()["message"]
        assert is_good(client, key["token"])


class TestTheEnd:
    """Of one's own key, and of all."""

    @pytest.mark.parametrize("permission", ["FULL", "SENDING"])
    def test_any_key_may_end_itself(self, client: httpx.Client, permission: str) -> None:
        """And nothing else, where it is not FULL."""
        key, bystander = created(client, permission=permission), created(client)
        answer = client.delete(f"{KEYS}/self", params={"reason": "left"}, headers=bearer(key))
        assert answer.status_code == 200
        assert answer.json()["success"] is True
        assert not is_good(client, key["token"])
        assert is_good(client, bystander["token"])
        assert client.get(f"{KEYS}/{key['id']}").json()["revokedReason"] == "left"
        assert client.delete(f"{KEYS}/self", headers=bearer(key)).status_code == 401

    def test_all_keys_of_an_organisation_end_together(self, sidecar: Sidecar) -> None:
        """The caller's own among them; keys of others, and those made later, are good."""
        admin_key, other = sidecar.create(), sidecar.create()
        others = [sidecar.create(admin_key.record.organization_id) for _ in range(3)]
        with sidecar.client(admin_key) as client:
            for key in (admin_key, other, *others):
                assert is_good(client, key.token.reveal())
            answer = client.post(f"{KEYS}/revoke-all", json={"reason": "laptop stolen"})
            assert answer.status_code == 200
            assert answer.json()["revoked"] == 4
            assert answer.json()["success"] is True
            for key in (admin_key, *others):
                assert not is_good(client, key.token.reveal())
            assert is_good(client, other.token.reveal())
            assert client.post(f"{KEYS}/revoke-all").status_code == 401
        later = sidecar.create(admin_key.record.organization_id)
        with sidecar.client(later) as client:
            shown = client.get(f"{KEYS}/{admin_key.record.id}").json()
            assert (shown["active"], shown["revokedReason"]) == (False, "laptop stolen")

    def test_a_key_for_test_does_not_end_live_ones(
        self, sidecar: Sidecar, admin_key: Created
    ) -> None:
        """403, and all of them are good."""
        test = sidecar.create(admin_key.record.organization_id, environment="test")
        with sidecar.client(test) as client:
            assert client.post(f"{KEYS}/revoke-all").status_code == 403
            assert is_good(client, admin_key.token.reveal())

    def test_a_reason_is_kept_and_checked(self, client: httpx.Client) -> None:
        """It is shown later, so it is as clean as a name."""
        key, other = created(client), created(client)
        path = f"{KEYS}/{key['id']}"
        for reason in ("", " ", "r" * 201, "a\u202eb", other["token"]):
            answer = client.delete(path, params={"reason": reason})
            assert answer.status_code == 400, reason
            assert other["token"] not in answer.text
        assert is_good(client, key["token"])
        assert client.delete(path, params={"reason": " moved "}).status_code == 200
        assert client.get(path).json()["revokedReason"] == "moved"


class TestChanges:
    """Expiry in words, and what may be kept with a key."""

    @pytest.mark.parametrize(
        ("duration", "milliseconds"),
        [("2s", 2_000), ("30m", 1_800_000), ("12h", DAY_MS // 2), ("90d", 90 * DAY_MS)],
    )
    def test_an_expiry_may_be_a_time_from_now(
        self, client: httpx.Client, sidecar: Sidecar, duration: str, milliseconds: int
    ) -> None:
        """On creation and on change."""
        end = iso(int(sidecar.clock() * 1000) + milliseconds)
        key = created(client, expiresIn=duration)
        assert key["expiresAt"] == end
        other = created(client)
        changed = client.patch(f"{KEYS}/{other['id']}", json={"expiresIn": duration})
        assert changed.json()["expiresAt"] == end

    @pytest.mark.parametrize(
        "body",
        [
            {"expiresIn": "0d"},
            {"expiresIn": "1y"},
            {"expiresIn": "-1d"},
            {"expiresIn": "1.5h"},
            {"expiresIn": " 1d"},
            {"expiresIn": "999999999w"},
            {"expiresIn": 5},
            {"expiresIn": "1d", "expiresAt": "2100-01-01T00:00:00Z"},
            {"metadata": {"a": {"b": 1}}},
            {"metadata": {"a": [1]}},
            {"metadata": {"a": "x" * 4_096}},
            {"metadata": "text"},
            {"metadata": []},
        ],
    )
    def test_what_no_key_may_have(self, client: httpx.Client, body: dict[str, Any]) -> None:
        """400 that names the field, and nothing is made or changed."""
        key = created(client)
        before = client.get(KEYS).json()
        for answer in (
            client.post(KEYS, json={"name": "CI", **body}),
            client.patch(f"{KEYS}/{key['id']}", json=body),
        ):
            assert answer.status_code == 400
            assert next(iter(body)) in answer.json()["message"]
        assert [one | {"lastUsed": ...} for one in client.get(KEYS).json()] == [
            one | {"lastUsed": ...} for one in before
        ]

    def test_metadata_is_kept_and_replaced(self, client: httpx.Client) -> None:
        """An object of scalars; null takes it away."""
        metadata = {"team": "päy", "tier": 2, "ratio": 0.5, "beta": True, "owner": None}
        key = created(client, metadata=metadata)
        path = f"{KEYS}/{key['id']}"
        assert key["metadata"] == client.get(path).json()["metadata"] == metadata
        assert client.patch(path, json={"metadata": {"a": 1}}).json()["metadata"] == {"a": 1}
        assert client.patch(path, json={"name": "CD"}).json()["metadata"] == {"a": 1}
        assert client.patch(path, json={"metadata": None}).json()["metadata"] == {}

    def test_metadata_holds_no_token(self, client: httpx.Client) -> None:
        """Neither as a value nor as a name; and the answer does not repeat it."""
        token = created(client)["token"]
        for metadata in ({"a": token}, {token: "a"}):
            answer = client.post(KEYS, json={"name": "CI", "metadata": metadata})
            assert answer.status_code == 400
            assert token not in answer.text

    def test_a_key_for_one_environment_is_unknown_in_another(self, client: httpx.Client) -> None:
        """Byte for byte; two environments are a requirement that no key meets."""
        live, test = created(client), created(client, environment="test")
        assert "_test_" in test["token"]
        assert is_good(client, live["token"], environment="live")
        assert is_good(client, test["token"], environment="test")
        assert not is_good(client, live["token"], environment="test")
        headers = {"Authorization": f"Bearer {live['token']}"}
        answers = [
            client.get(f"/verify?environment={query}", headers=headers)
            for query in ("test", "", "live&environment=test", "nowhere")
        ]
        forged = live["token"][:-1] + ("A" if live["token"][-1] != "A" else "B")
        answers.append(client.get("/verify", headers={"Authorization": f"Bearer {forged}"}))
        assert {answer.status_code for answer in answers} == {401}
        assert len({answer.content for answer in answers}) == 1
        required = {"X-Keylatch-Require-Environment": "test"}
        assert client.get("/ext_authz/x", headers=headers | required).status_code == 401
        required = {"X-Keylatch-Require-Environment": "live"}
        assert client.get("/ext_authz/x", headers=headers | required).status_code == 200


class TestAudit:
    """`/v1/audit`"""

    def test_every_change_is_there_with_who_and_what(
        self, client: httpx.Client, admin_key: Created
    ) -> None:
        """The newest first; no secret is in it."""
        key = created(client, name="ci")
        path = f"{KEYS}/{key['id']}"
        client.patch(path, json={"active": False, "metadata": {"a": 1}})
        rotated = client.post(f"{path}/rotate", json={"graceSeconds": 5}).json()
        client.post(f"{path}/rotate/cancel")
        client.delete(path, params={"reason": "done"})
        lines = client.get("/v1/audit", params={"key": key["id"]}).json()
        assert [(line["action"], line["actor"]) for line in lines] == [
            (action, admin_key.record.id)
            for action in (
                "key.delete",
                "key.rotate.cancel",
                "key.rotate",
                "key.change",
                "key.create",
            )
        ]
        assert lines[0]["details"] == {"reason": "done"}
        text = b'{"a":1}'
        digest = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
        assert lines[3]["details"] == {"active": False, "metadata": digest}
        assert lines[4]["details"]["name"] == "ci"
        assert lines[2]["details"]["graceEndsAt"] == rotated["previous"]["expiresAt"]
        assert all(line["keyId"] == key["id"] for line in lines)
        for token in (key["token"], rotated["token"]):
            assert token.rpartition("_")[2] not in json.dumps(lines)

    def test_it_comes_in_pages(self, client: httpx.Client) -> None:
        """Each links the next."""
        for number in range(3):
            created(client, name=f"key {number}")
        first = client.get("/v1/audit", params={"limit": 2})
        assert [line["details"]["name"] for line in first.json()] == ["key 2", "key 1"]
        second = client.get(f"/v1/audit{first.links['next']['url']}")
        assert [line["details"]["name"] for line in second.json()] == ["key 0", "Admin key"]

    def test_it_is_ones_own(self, client: httpx.Client, sidecar: Sidecar) -> None:
        """Of another organisation there is nothing, also where its key is named."""
        other = sidecar.create()
        assert client.get("/v1/audit", params={"key": other.record.id}).json() == []
        assert other.record.id not in client.get("/v1/audit").text

    @pytest.mark.parametrize("limit", ["0", "1001", "x", "1&limit=2"])
    def test_a_page_has_bounds(self, client: httpx.Client, limit: str) -> None:
        """400 that says which."""
        answer = client.get(f"/v1/audit?limit={limit}")
        assert answer.status_code == 400
        assert "limit" in answer.json()["message"]
