"""The parts below an ED-LoRA at their bounds: numbers of an update, limits of names, what the Hub's answers mean."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from diffusers_mixofshow.concepts import Concept
from diffusers_mixofshow.edlora import EDLoRA, LowRank, defects, header, hub, models, reading, stock
from diffusers_mixofshow.edlora.low_rank import low_rank_delta
from diffusers_mixofshow.errors import EDLoRAFormatError, EDLoRANotFoundError, HubError


def update_of(rank: int = 2, alpha: float = 3.0, dtype: torch.dtype = torch.float32, **fields: Any) -> LowRank:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(rank, 5, generator=generator), torch.randn(7, rank, generator=generator)
    return LowRank(**{"down": down.to(dtype), "up": up.to(dtype), "alpha": alpha, **fields})


# --- one update ---


def test_the_change_is_alpha_over_rank_times_up_down() -> None:
    update = update_of()
    expected = torch.tensor(
        [[sum(1.5 * update.up[i, r] * update.down[r, j] for r in range(2)) for j in range(5)] for i in range(7)]
    )
    assert (update.rank, update.scaling) == (2, 1.5)
    torch.testing.assert_close(low_rank_delta(update), expected)
    half = update_of(dtype=torch.float16)
    assert low_rank_delta(half).dtype == torch.float32
    assert low_rank_delta(half, like=torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert low_rank_delta(update_of(dtype=torch.float64), like=torch.zeros(1)).dtype == torch.float64
    torch.testing.assert_close(low_rank_delta(half), expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("alpha", "dtype", "folded_dtype"),
    [
        (2.0, torch.float16, torch.float16),
        (4.0, torch.float16, torch.float16),
        (3.0, torch.float16, torch.float32),
        (3.0, torch.float64, torch.float64),
        (-1.0, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_folded_update_is_the_same_without_a_scaling(
    alpha: float, dtype: torch.dtype, folded_dtype: torch.dtype
) -> None:
    update = update_of(alpha=alpha, dtype=dtype)
    folded = update.folded
    assert (folded.scaling, folded.alpha, folded.rank) == (1, 2.0, 2)
    assert (folded is update) is (alpha == 2.0)
    assert (folded.up.dtype, folded.down.dtype) == (folded_dtype, dtype)
    torch.testing.assert_close(low_rank_delta(folded), low_rank_delta(update))


def test_factors_of_a_convolution_have_two_more_axes_in_a_file() -> None:
    update = update_of(convolution=True)
    down, up = update.in_file
    assert (down.shape, up.shape) == ((2, 5, 1, 1), (7, 2, 1, 1))
    again = LowRank.from_file(down, up, 3.0)
    assert again.convolution
    assert torch.equal(again.down, update.down)
    assert torch.equal(again.up, update.up)
    plain = LowRank.from_file(update.down, update.up, 3.0)
    assert (plain.convolution, plain.in_file[0].shape) == (False, (2, 5))
    wide = torch.zeros(2, 5, 3, 1)
    assert LowRank.from_file(wide, update.up, 1.0).down is wide


def test_stock_diffusers_is_told_nothing_where_it_guesses_right() -> None:
    assert stock.adapter_metadata({"unet.a.to_k": update_of(4, 4.0), "unet.b.to_k": update_of(4, 4.0)}) == {}
    assert stock.adapter_metadata({}) == {}
    told = stock.adapter_metadata({"unet.a.to_k": update_of(2, 2.0), "unet.b.to_k": update_of(3, 3.0)})
    assert json.loads(told["lora_adapter_metadata"])["unet.rank_pattern"] == {r"^b\.to_k": 3}
    told = stock.adapter_metadata({"unet.a.to_k": update_of(4, 2.0)})
    assert json.loads(told["lora_adapter_metadata"]) == {
        "unet.r": 4,
        "unet.lora_alpha": 2.0,
        "unet.target_modules": ["a.to_k"],
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
    }


def test_stock_diffusers_is_told_every_layer_that_differs() -> None:
    lora = {
        "text_encoder.text_model.encoder.0.q": update_of(4, 4.0),
        "text_encoder.text_model.encoder.1.q": update_of(2, 8.0),
        "unet.a.to_k": update_of(2, 2.0),
        "unet.b.to_k": update_of(2, 2.0),
        "unet.c.to_k": update_of(3, 2.0),
    }
    assert json.loads(stock.adapter_metadata(lora)["lora_adapter_metadata"]) == {
        "text_encoder.r": 4,
        "text_encoder.lora_alpha": 4.0,
        "text_encoder.target_modules": ["encoder.0.q", "encoder.1.q"],
        "text_encoder.rank_pattern": {r"encoder\.1\.q": 2},
        "text_encoder.alpha_pattern": {r"encoder\.1\.q": 8.0},
        "unet.r": 2,
        "unet.lora_alpha": 2.0,
        "unet.target_modules": ["a.to_k", "b.to_k", "c.to_k"],
        "unet.rank_pattern": {r"^c\.to_k": 3},
        "unet.alpha_pattern": {},
    }


# --- defects ---


def test_the_bounds_of_names_and_shapes() -> None:
    assert (defects.LONGEST_NAME, defects.WIDEST) == (100, 131072)
    assert (header.ONE_ENCODER, header.FORMAT_VERSION) == (1, 2)
    assert (reading.LONGEST_HEADER, reading.LARGEST_FILE, reading.MOST_TENSORS) == (
        8 * 1024**2,
        8 * 1024**3,
        20_000,
    )
    concept = Concept.from_name("rex", "d" * 100)
    rows = {"<rex1>": torch.zeros(3, 8), "<rex2>": torch.zeros(3, 8)}

    def found(concept: Concept = concept, embeddings: dict[str, torch.Tensor] = rows, layers: str = "abc") -> str:
        return "; ".join(defects.content_defects([concept], embeddings, {"unet.x": update_of()}, layers))

    assert found() == ""
    assert found(dataclasses.replace(concept, class_word="d" * 101)).startswith("names longer than 100 characters")
    assert found(dataclasses.replace(concept, class_word="a\x07b")).startswith("names longer than 100 characters")
    assert found(embeddings={**rows, "<rex2>": torch.zeros(3, 9)}) == (
        "embeddings differ in width: 2 (<rex1> 8, <rex2> 9)"
    )
    assert found(embeddings={**rows, "<rex2>": torch.zeros(4, 8)}) == (
        "embeddings not of shape (layers = 3, dim): 1 (<rex2> (4, 8))"
    )
    assert found(embeddings={"<rex1>": torch.zeros(3, 8)}) == "missing embeddings: 1 (<rex2>)"
    assert (
        found(embeddings={**rows, "<tom>": torch.zeros(3, 8)}) == "embeddings of tokens that no concept has: 1 (<tom>)"
    )
    assert found(layers="aba") == "it names a cross-attention layer twice"
    assert found(embeddings={token: torch.zeros(0, 8) for token in rows}, layers="") == (
        "it names no cross-attention layers"
    )
    wide = {token: torch.zeros(3, 131072) for token in rows}
    assert found(embeddings=wide) == ""
    assert "not of shape" in found(embeddings={token: torch.zeros(3, 131073) for token in rows})


@pytest.mark.parametrize(
    ("update", "told"),
    [
        (update_of(), ""),
        (update_of(down=torch.zeros(0, 5), up=torch.zeros(7, 0)), "not a pair"),
        (update_of(down=torch.zeros(3, 5)), "not a pair"),
        (update_of(down=torch.zeros(2, 131072)), ""),
        (update_of(down=torch.zeros(2, 131073)), "not a pair"),
        (update_of(up=torch.zeros(131073, 2)), "not a pair"),
        (update_of(up=torch.zeros(7, 2, 1)), "not a pair"),
        (update_of(alpha=float("inf")), "alpha is not finite: 1 (unet.x inf)"),
        (update_of(alpha=float("nan")), "alpha is not finite: 1 (unet.x nan)"),
        (update_of(down=torch.full((2, 5), float("nan"))), "values that are not finite: 1 (unet.x.down)"),
        (update_of(up=torch.full((7, 2), float("-inf"))), "values that are not finite: 1 (unet.x.up)"),
        (update_of(up=torch.zeros(7, 2, dtype=torch.int8)), "not in a floating dtype"),
        (update_of(dtype=torch.float64), ""),
        (update_of(dtype=torch.bfloat16), ""),
    ],
)
def test_what_is_wrong_with_an_update(update: LowRank, told: str) -> None:
    found = "; ".join(defects.content_defects([], {}, {"unet.x": update}, []))
    assert told in found
    assert bool(found) is bool(told)
    (strange,) = defects.content_defects([], {}, {"vae.x": update_of()}, [])
    assert strange == "layers of no known component (text_encoder, text_encoder_2, transformer, unet): 1 (vae.x)"
    assert defects.content_defects([], {}, {}, []) == ["it holds neither a concept nor an update"]


def test_values_far_behind_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "_CHECKED_AT_ONCE", 12)
    values = torch.zeros(101, 5)
    assert defects._is_finite(values)
    for row in (0, 1, 2, 50, 100):
        values[row, 4] = float("nan")
        assert not defects._is_finite(values)
        values[row, 4] = 0
    assert not defects._is_finite(torch.full((2, 13), float("inf")))


def test_texts_are_cut_and_do_nothing_to_a_terminal() -> None:
    assert defects.sanitise("a" * 160) == "a" * 160
    assert defects.sanitise("a" * 161) == "a" * 157 + "..."
    assert defects.sanitise("abcdef", 5) == "ab..."
    for character in "\x00\x08\x0b\x0c\x0e\x1f\x7f\x9f\u200e\u202e\u2069":
        assert not defects.is_showable(f"a{character}")
        assert defects.sanitise(f"a{character}b") == "a" + ascii(character)[1:-1] + "b"
    assert defects.is_showable("a\tb\nc\rd ü 猫")
    assert defects.list_names("abcdef") == "6 (a, b, c, d, e, f)"
    assert defects.list_names("abcdefg") == "7 (a, b, c, d, e, f, ...)"
    with pytest.raises(EDLoRAFormatError) as caught:
        defects.raise_if_any(["x" * 1201, "y"], subject="s", remedy="r")
    assert str(caught.value) == f"s: {'x' * 1197}...; y. r"


# --- the header ---


def test_texts_of_a_header_have_a_length() -> None:
    assert header.is_text("a" * 500)
    assert not header.is_text("a" * 501)
    assert not header.is_text("a\x1b")
    assert not header.is_text(3)
    assert header.decode('{"a": 1}' + " " * (4 * 2**20 - 8)) == {"a": 1}
    assert header.decode('{"a": 1}' + " " * (4 * 2**20 - 7)) is None


def test_a_header_that_nobody_would_read_is_not_written() -> None:
    def written(length: int) -> str:
        return dataclasses.replace(header.EMPTY, training={"x": "y" * length}).to_json()

    spare = 4 * 2**20 - len(written(0))
    assert header.parse(written(spare))[1] == []
    with pytest.raises(EDLoRAFormatError, match=r"The header has 4,194,305 characters, longer than the 4,194,304"):
        written(spare + 1)
    assert json.loads(written(0))["versions"] == {
        name: metadata.version(name) for name in ("diffusers-mixofshow", "torch", "diffusers", "transformers", "peft")
    }


# --- one pack ---


def test_the_digest_tells_what_is_drawn_with_and_nothing_else(pack: EDLoRA) -> None:
    site, update = next(iter(pack.lora.items()))
    token, rows = next(iter(pack.embeddings.items()))

    def with_update(**fields: Any) -> EDLoRA:
        return dataclasses.replace(pack, lora={**pack.lora, site: dataclasses.replace(update, **fields)})

    others = [
        with_update(alpha=5.0),
        with_update(up=update.up + 1),
        with_update(down=update.down + 1),
        with_update(up=update.up.double()),
        dataclasses.replace(pack, embeddings={**pack.embeddings, token: rows + 1}),
        dataclasses.replace(pack, embeddings={**pack.embeddings, "<other>": rows}),
        dataclasses.replace(pack, lora={f"{name}x": each for name, each in pack.lora.items()}),
    ]
    assert len({pack.digest, *(other.digest for other in others)}) == 1 + len(others)
    alike = [
        dataclasses.replace(pack, base_model="x", training={}),
        dataclasses.replace(pack, lora=dict(reversed(pack.lora.items()))),
        dataclasses.replace(pack, embeddings=dict(reversed(pack.embeddings.items()))),
    ]
    assert {other.digest for other in alike} == {pack.digest}


def test_equal_packs_are_equal_files_whose_data_is_aligned(pack: EDLoRA, tmp_path: Path) -> None:
    turned = dataclasses.replace(pack, lora=dict(reversed(pack.lora.items())))
    first, other = (each.save_pretrained(tmp_path / name).read_bytes() for name, each in (("a", pack), ("b", turned)))
    length = int.from_bytes(first[:8], "little")
    assert length % 8 == 0
    names = list(json.loads(first[8 : 8 + length]))
    assert names == sorted(names)
    other_length = int.from_bytes(other[:8], "little")
    assert json.loads(other[8 : 8 + other_length]).keys() == set(names)


# --- the Hub ---


httpx: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])
"""Under whatever name the client has it."""


def answer(status: int) -> Any:
    return httpx.Response(status, request=httpx.Request("GET", "http://hub"))


def http(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError, text: str = "said") -> HfHubHTTPError:
    return kind(text, response=answer(status))


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *[(http(status), True) for status in (408, 412, 429, 500, 503, 599)],
        *[(http(status), False) for status in (400, 401, 403, 404, 409, 411, 413, 430, 499)],
        (httpx.ReadTimeout("slow"), True),
        (httpx.ReadError("cut"), True),
        (httpx.ConnectError("none"), True),
        (httpx.RemoteProtocolError("cut"), True),
        (OSError("shorter than announced"), True),
        (FileNotFoundError("gone"), False),
        (LocalEntryNotFoundError("x"), False),
    ],
)
def test_what_passes_is_tried_three_times_and_nothing_else(
    error: Exception, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    tries: list[int] = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)

    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)):
        hub._retry(fail)
    assert (len(tries), waits) == ((3, [1.0, 3.0]) if passes else (1, []))
    assert hub._retry(lambda: 5) == 5


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (http(403, GatedRepoError), HubError, "Access to 'me/x' at revision 'v1' is gated. Accept its terms"),
        (http(404, RepositoryNotFoundError), EDLoRANotFoundError, "There is no repository 'me/x' on the Hub, or it"),
        (http(404, RevisionNotFoundError), EDLoRANotFoundError, "The repository 'me/x' has no revision 'v1' (branch"),
        (EntryNotFoundError("x"), EDLoRANotFoundError, "'me/x' at revision 'v1' holds no ED-LoRA (edlora."),
        (LocalEntryNotFoundError("x"), EDLoRANotFoundError, "'me/x' at revision 'v1' is not in the cache, and the"),
        (HFValidationError("x"), HubError, "'me/x' is no valid Hub id; expected 'user/name'"),
        (OfflineModeIsEnabled("x"), HubError, "HF_HUB_OFFLINE is set, so the Hub was not asked for 'me/x' at rev"),
        (http(401), HubError, "The Hub refused access to 'me/x' at revision 'v1' (HTTP 401). Log in with"),
        (http(403), HubError, "The Hub refused access to 'me/x' at revision 'v1' (HTTP 403). Log in with"),
        (http(412), HubError, "Others keep committing to 'me/x' at revision 'v1', so nothing was sent"),
        (http(500, text="broke secret hf_abcdefghijklmnopq"), HubError, "could not serve 'me/x' at revision 'v1': "),
        (ValueError("Bearer abc odd"), HubError, "could not serve 'me/x' at revision 'v1': Bearer <token> odd"),
    ],
)  # fmt: skip
def test_what_the_hub_answers_is_said_plainly(error: Exception, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind) as caught, hub._translate_errors("me/x", "v1", "secret\n"):
        raise error
    assert told in str(caught.value)
    assert type(caught.value) is kind
    assert "hf_abc" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_ids_and_commits_are_told_by_their_form(tmp_path: Path) -> None:
    assert hub.is_repo_id("u/" + "x" * 198)
    assert not hub.is_repo_id("u/" + "x" * 199)
    assert not hub.is_repo_id(Path("u/x"))
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshots = Path("/cache/models--u--x/snapshots")
    assert hub.commit_of(snapshots / commit / "deep" / "x.safetensors") == commit
    assert hub.commit_of(Path("/snapshots/a") / snapshots / commit / "x") == commit
    for other in (snapshots / commit[:39] / "x", snapshots / "main" / "x", snapshots, Path("/elsewhere") / commit):
        assert hub.commit_of(other) == ""


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x" * 89], "edlora-" + "x" * 89),
        (["x" * 90], "mixofshow-1-concepts-" + "x" * 75),
        (["a", "b" * 84], "mixofshow-a-" + "b" * 84),
        (["a", "b" * 85], "mixofshow-2-concepts-a"),
    ],
)
def test_a_derived_name_is_cut_at_the_hubs_limit(names: list[str], expected: str) -> None:
    assert hub.repo_name([Concept.from_name(name, "dog") for name in names]) == expected


@pytest.mark.parametrize(
    ("errors", "answers", "asked"),
    [
        ([], True, 1),
        ([httpx.ConnectError("x")], True, 2),
        ([httpx.ConnectTimeout("x"), httpx.ConnectError("x")], False, 2),
        ([httpx.ReadTimeout("x")], True, 1),
        ([ValueError("x")], True, 1),
    ],
)
def test_whether_the_hub_is_there_is_asked_twice(
    errors: list[Exception], answers: bool, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    waits: list[float] = []
    left = list(errors)

    def head(url: str, timeout: float) -> None:
        seen.append((url, timeout))
        if left:
            raise left.pop(0)

    monkeypatch.setattr(hub.huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.huggingface_hub.constants, "ENDPOINT", "http://hub")
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    assert hub.is_reachable() is answers
    assert seen == [("http://hub", 10.0)] * asked
    assert waits == [1.0, 0.0][: len(errors) - len(left) - (asked == 1 and bool(errors))]
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.is_reachable()
    assert len(seen) == asked


# --- models by name ---


def test_a_model_is_looked_for_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TQDM_DISABLE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    calls: list[tuple[str, dict[str, Any]]] = []

    def load(place: str, **options: Any) -> str:
        calls.append((str(place), options))
        return "model"

    cached: list[tuple[object, ...]] = []

    def answering(there: bool, found: Path | None, offline: bool = False) -> Callable[[], str]:
        def cache(name: str, file: str, *, revision: str | None, cache_dir: str | None) -> Path | None:
            cached.append((name, file, revision, cache_dir))
            return found

        monkeypatch.setattr(hub, "is_reachable", lambda: there)
        monkeypatch.setattr(hub, "find_in_cache", cache)
        monkeypatch.setattr(models.huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        return lambda: models.load_model("user/base", load, index="config.json")

    assert models.load_model("base", load) == "model"
    assert answering(True, None)() == "model"
    assert cached == []
    assert answering(False, Path("x"))() == "model"
    assert answering(True, Path("x"), offline=True)() == "model"
    alone = {"local_files_only": True}
    assert calls == [("base", {}), ("user/base", {}), ("user/base", alone), ("user/base", alone)]
    assert cached == [("user/base", "config.json", None, None)] * 2
    assert capsys.readouterr().err.splitlines() == ["Loading base ...", *["Loading user/base ..."] * 3]
    with pytest.raises(HubError, match="'user/base' is neither on this disk nor in the cache"):
        answering(False, None)()
    with pytest.raises(FileNotFoundError, match="'user/base' is not in the cache, and HF_HUB_OFFLINE is set"):
        answering(True, None, offline=True)()
    for gone in ("./gone", "/gone", "~/gone", "base/gone"):
        with pytest.raises(FileNotFoundError, match="There is no such folder"):
            models.load_model(gone, load)
    assert len(calls) == 4
    models.refuse_missing_folder("gone")
    models.refuse_missing_folder("user/gone")
