"""The benchmarks: where their files are found, in which layouts they are read, and whether they are the known ones."""

import base64
import hashlib
import io
import json
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_rasft.data.reading import read_records
from megatron_rasft.errors import DataError
from megatron_rasft.types import Check, CodeTests, ProgramCase
from megatron_rasft.verify.math_extraction import closed_boxes

Kind = Literal["math", "code"]
SUFFIXES = (".jsonl.gz", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """One benchmark as it is published."""

    name: str
    title: str
    kind: Kind
    num_rows: int
    """0 for a set of the user's own, of which nothing is known."""
    text_sha256: str
    """Of the uncompressed file in this project's layout; README.md of the data names its origin."""
    content_sha256: str
    """Of problems and answers (or tests) alone, white space squeezed: the same in every layout. See ``fingerprint``."""
    also_called: tuple[str, ...] = ()
    """Other names of files and folders, lower case, without - and _."""
    rel_tolerance: float = 0.0
    """Up to which two plain numbers are equal: Minerva's answers are rounded."""


@dataclass(kw_only=True, slots=True)
class Problem:
    """One row of a benchmark."""

    problem_id: str
    text: str
    """What the model is asked; a code prompt with everything but the wrapping words."""
    answer: str = ""
    """Gold answer; empty for code."""
    tests: dict[str, Any] = field(default_factory=dict)
    """Code only: what decides, by the names of the code sets (test, tests, entry_point, ...)."""

    @property
    def check(self) -> Check:
        """What the verifier holds a response against."""
        if not self.tests:
            return self.answer
        entry_point = self.tests.get("entry_point", "")
        pairs = [test for test in self.tests.get("tests", ()) if isinstance(test, dict)]
        if pairs:
            is_functional = pairs[0]["testtype"] == "functional"
            cases = tuple(ProgramCase(input=pair["input"], output=pair["output"]) for pair in pairs)
            return CodeTests(
                style="functional" if is_functional else "stdin", entry_point=entry_point, cases=cases
            )
        script = self.tests.get("test")
        if script is not None and "def check(" in script:
            return CodeTests(style="check", tests=(script,), entry_point=entry_point, prompt=self.text)
        # The script of MBPP+ asserts by itself; the base asserts beside it are shown to the model.
        scripts = tuple(self.tests["tests"]) if script is None else (script,)
        setup = self.tests.get("test_setup_code", "")
        return CodeTests(style="asserts", tests=scripts, entry_point=entry_point, setup=setup)


@dataclass(kw_only=True, slots=True)
class Benchmark:
    """A set that was read and compared with what is known of it."""

    name: str
    title: str
    kind: Kind
    path: Path
    problems: list[Problem]
    sha256: str
    """Of the uncompressed file."""
    is_verified: bool
    """Whether file or content is the known one."""
    rel_tolerance: float = 0.0


def find_file(known: KnownSet, folder: Path) -> Path:
    """The file of a set in ``folder``, by its name, or in a clone of its Hugging Face data set.

    Raises:
        DataError: there is none, or more than one.
    """
    names = {_plain(known.name), *known.also_called}
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and _plain(_stem(p)) in names]
    if not found:
        clones = [p for p in sorted(folder.iterdir()) if p.is_dir() and _plain(p.name) in names]
        found = [p for clone in clones for p in _split_to_evaluate(clone)]
    if not found:
        raise DataError(
            f"{folder} has no {known.name}.jsonl.gz, .jsonl or .parquet. Put the file there or name it: --benchmarks "
            f"{known.name}=FILE"
        )
    if len(found) > 1:
        raise DataError(
            f"{folder} holds more than one file of {known.name}: {found[0].relative_to(folder)} and "
            f"{found[1].relative_to(folder)}. Name one: --benchmarks {known.name}=FILE"
        )
    return found[0]


def read_benchmark(known: KnownSet, path: Path, accept_unknown: bool = False) -> Benchmark:
    """Read a set and hold it against the known one.

    Args:
        known: which set the file should be.
        path: in this project's layout or in that of the set's Hugging Face data set.
        accept_unknown: take other content and other numbers of rows too; ``is_verified`` is then False.

    Raises:
        DataError: with file and line, or with both checksums or numbers of rows.
    """
    parse = _parse_math if known.kind == "math" else _parse_code
    problems, seen = [], set()
    for line, record in read_records(path):
        try:
            if not isinstance(record, dict):
                raise ValueError(str(getattr(record, "reason", "not a JSON object")))
            problem = parse({str(k).lower(): v for k, v in record.items()}, f"{known.name}/{line}")
        except (KeyError, ValueError, TypeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}:{line} is no row of {known.name}: {reason}.") from error
        if problem.problem_id in seen:
            raise DataError(
                f"{path}:{line}: id {problem.problem_id} was there before. Cut one of the rows out."
            )
        seen.add(problem.problem_id)
        problems.append(problem)
    sha256 = text_checksum(path)
    is_verified = sha256 == known.text_sha256 or fingerprint(problems) == known.content_sha256
    accept_unknown |= not known.num_rows
    if not problems:
        raise DataError(f"{path} holds no rows. Write the problems to it, or leave {known.name} out.")
    if not accept_unknown and len(problems) != known.num_rows:
        raise DataError(
            f"{path} has {len(problems)} rows, {known.title} has {known.num_rows}. Get the whole set, or give "
            "--unknown-data accept, which marks its results as unverified."
        )
    if not accept_unknown and not is_verified:
        raise DataError(
            f"{path} is not the known {known.title}: sha256 {sha256[:12]}... instead of {known.text_sha256[:12]}..., and "
            "its problems and answers differ too. Get the set again, or give --unknown-data accept, which marks its "
            "results as unverified."
        )
    return Benchmark(
        name=known.name,
        title=known.title,
        kind=known.kind,
        path=path,
        problems=problems,
        sha256=sha256,
        is_verified=is_verified,
        rel_tolerance=known.rel_tolerance,
    )


def text_checksum(path: Path) -> str:
    """sha256 of a file, of one ending in .gz of what is packed in it."""
    import gzip

    digest = hashlib.sha256()
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(problems: list[Problem]) -> str:
    """sha256 over problems and what decides them.

    Order of rows, ids and white space do not count, nor do the thousands separators and leading zeros of whole numbers.
    """
    lines = sorted(
        json.dumps([_squeeze(p.text), _whole(p.answer), _squeeze(json.dumps(p.tests, sort_keys=True))])
        for p in problems
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def _whole(answer: str) -> str:
    answer = _squeeze(answer)
    return str(int(answer.replace(",", ""))) if re.fullmatch(r"\d[\d,]{0,30}", answer) else answer


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _stem(path: Path) -> str:
    name = path.name
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), "")


def _split_to_evaluate(clone: Path) -> list[Path]:
    """The files of the test split, or the only file: data sets of one split call it train."""
    files = [p for p in sorted(clone.rglob("*")) if p.name.endswith(SUFFIXES) and ".git" not in p.parts]
    tests = [p for p in files if re.match(r"test(?![a-z])", p.name)]
    return tests or (files if len(files) == 1 else [])


# ---- rows


def _first(record: dict[str, Any], *names: str) -> Any:
    """The first of the fields that is there; KeyError names the one this project uses."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise KeyError(names[0])


def _id(record: dict[str, Any], default: str) -> str:
    for name in ("id", "unique_id", "task_id", "problem_id", "question_id"):
        if record.get(name) is not None:
            return str(record[name])
    return default


def _parse_math(record: dict[str, Any], default_id: str) -> Problem:
    text = _first(record, "problem", "question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the problem is empty")
    return Problem(problem_id=_id(record, default_id), text=text, answer=_gold(record))


def _gold(record: dict[str, Any]) -> str:
    """The gold answer as a bare string, whichever way the data set writes it."""
    try:
        value = _first(record, "answer", "final_answer", "expected_answer")
    except KeyError:
        boxes = closed_boxes(str(record.get("solution") or ""))
        if not boxes:
            raise
        value = boxes[-1]
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{len(value)} final answers, one is needed")
        value = str(value[0]).strip("$")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str):
        value = str(value)
    if "####" in value:  # GSM8K: the reasoning, then the answer
        value = value.rpartition("####")[2]
    if not value.strip():
        raise ValueError("the answer is empty")
    return value.strip()


def _parse_code(record: dict[str, Any], default_id: str) -> Problem:
    is_paired = isinstance(record.get("tests"), list) and any(isinstance(t, dict) for t in record["tests"])
    if is_paired or "public_test_cases" in record:
        return _parse_contest(record, default_id)
    name = _id(record, default_id)
    if name.isdigit():
        name = f"Mbpp/{name}"
    tests: dict[str, Any] = {}
    if record.get("test"):
        tests["test"] = str(record["test"])
    asserts = record.get("tests") or record.get("test_list")
    if asserts:
        if not all(isinstance(test, str) for test in asserts):
            raise ValueError("its tests are neither statements nor pairs of input and output")
        tests["tests"] = list(asserts)
    if not tests:
        raise KeyError("tests")
    entry_point = record.get("entry_point")
    if entry_point:
        tests["entry_point"] = str(entry_point)
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    if setup:
        tests["test_setup_code"] = str(setup)
    # mbpp_plus has the plain task beside a prompt that is a docstring
    text = str(_first(record, "text", "prompt", "problem"))
    return Problem(problem_id=name, text=text, tests=tests)


def _parse_contest(record: dict[str, Any], default_id: str) -> Problem:
    """A row of LiveCodeBench: pairs of input and output."""
    pairs: list[dict[str, str]] = []
    if record.get("tests"):
        pairs = list(record["tests"])
    else:
        pairs = json.loads(_first(record, "public_test_cases"))
        if record.get("private_test_cases"):
            pairs += _hidden_tests(str(record["private_test_cases"]))
    metadata = record.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    tests: dict[str, Any] = {
        "tests": [{k: str(p[k]) for k in ("input", "output", "testtype")} for p in pairs]
    }
    entry_point = record.get("entry_point") or metadata.get("func_name")
    if entry_point:
        tests["entry_point"] = str(entry_point)
    if record.get("starter_code"):
        tests["starter_code"] = str(record["starter_code"])
    return Problem(
        problem_id=_id(record, default_id),
        text=str(_first(record, "prompt", "question_content")),
        tests=tests,
    )


class _NoGlobals(pickle.Unpickler):
    """Reads plain strings, and refuses whatever would import or call something."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the hidden tests would call {module}.{name}: the file is not LiveCodeBench's")


def _hidden_tests(packed: str) -> list[dict[str, str]]:
    """The private tests of code_generation_lite: plain JSON, or JSON pickled, deflated and in base 64."""
    try:
        return json.loads(packed)
    except json.JSONDecodeError:
        stream = io.BytesIO(zlib.decompress(base64.b64decode(packed)))
        return json.loads(_NoGlobals(stream).load())


# ---- what a model is asked

_BLOCK = "one ```python block"


def ask(benchmark: Benchmark, prompt_suffix: str) -> Callable[[Problem], str]:
    """How a problem of this set is put to a model, as the user's message."""
    if benchmark.kind == "math":
        return lambda problem: problem.text + prompt_suffix
    return _ask_for_code


def _ask_for_code(problem: Problem) -> str:
    tests = problem.tests
    if "starter_code" in tests:
        return (
            f"{problem.text}\n\nComplete this class and answer with all of it in {_BLOCK}:\n\n"
            f"```python\n{tests['starter_code']}\n```"
        )
    if any(isinstance(test, dict) for test in tests.get("tests", ())):
        return (
            f"{problem.text}\n\nWrite a Python program that reads standard input and prints the answer. Answer with "
            f"{_BLOCK}."
        )
    if "tests" in tests:
        shown = "\n".join(tests["tests"])
        return f"{problem.text}\n\nThe code must pass these tests:\n\n{shown}\n\nAnswer with {_BLOCK}."
    return (
        "Complete this Python function. Answer with the whole of it, imports included, in "
        f"{_BLOCK}.\n\n```python\n{problem.text}```"
    )


def chosen(names: list[str], folder: Path | None) -> Iterator[tuple[KnownSet, Path]]:
    """Known set and file of each NAME or NAME=FILE; a name that is not known is a mathematical set of the user's own.

    Raises:
        ValueError, DataError: the name is unknown, the file is not there.
    """
    for entry in names:
        name, _, file = entry.partition("=")
        if name not in KNOWN_SETS and not file:
            raise ValueError(
                f"--benchmarks: {name!r} is unknown. Known are {', '.join(KNOWN_SETS)}; a set of your own is named with "
                "its file, NAME=FILE."
            )
        if file:
            if not Path(file).is_file():
                raise DataError(f"--benchmarks {entry}: {file} is no file.")
            yield KNOWN_SETS.get(name) or _known(name, name, 0, "", ""), Path(file)
        elif folder is None:
            raise ValueError(
                f"--benchmarks {name} needs --data-folder DIR, or its file: --benchmarks {name}=FILE"
            )
        elif not folder.is_dir():
            raise DataError(f"--data-folder {folder} is no folder.")
        else:
            yield KNOWN_SETS[name], find_file(KNOWN_SETS[name], folder)


def _known(
    name: str,
    title: str,
    num_rows: int,
    text: str,
    content: str,
    *also: str,
    kind: Kind = "math",
    tol: float = 0.0,
) -> KnownSet:
    return KnownSet(
        name=name,
        title=title,
        kind=kind,
        num_rows=num_rows,
        text_sha256=text,
        content_sha256=content,
        also_called=also,
        rel_tolerance=tol,
    )


KNOWN_SETS = {
    known.name: known
    for known in (
        _known("math500", "MATH-500", 500,
               "8fa50521e8e89f63d7e4687237ec286d4c091089df50220fbdfb3936e13455c5",
               "d85ca86cb2e97aea30257325c85db1c7f8dfe89118932829c2fd5a0dad75a932", "mathoai"),
        _known("minerva_math", "Minerva Math", 272,
               "4839734d80f9424c1c82a07a1a1b93edb52036e766c8e29761c8a4954f6806bc",
               "2ebff90d263e64c28a694cdbc20add1e39ef8a415fa444b9e713c4d6f102326e", "minerva", tol=0.0001),
        _known("olympiadbench", "OlympiadBench", 675,
               "97933724a5c90509e601f378ab893a8d15f91a84b28d07c6861477be98c55e19",
               "0b2aad3bb38cd95fa646cecd7174e96480edd4e8b3edaa2874626661d7c0407c", "olympiadbenchoetomathsencomp", "oetomathsencomp"),
        _known("aime24", "AIME 2024", 30,
               "9ce43c202fa7269e00fa4c7e7a100e1d99cc39e7c861b3477a3c2c1c2c8e952e",
               "f21ec99c9e13fa168445e297ed62e650d86f5cbd4c8fb09538fc8ccef543d02d", "aime2024"),
        _known("aime25", "AIME 2025", 30,
               "9f431f5388c4968e02788cfb8a5ebbc57e922c4f4f256da3b542d39308ba2cb0",
               "e59c3718f1f302b8e1187e4b9a884746d08781519dfac378d888d3a4fe82472e", "aime2025"),
        _known("amc23", "AMC 2023", 40,
               "47c63e1e8b72b5c19e8b7f832ed3d1013867d72e0d197655f74778bc88ed4e20",
               "cedf90639c0c750a4de72b1ce16ae175ccb919a00b2b6723aa85abdacab7cb10", "amc2023"),
        _known("gsm8k", "GSM8K", 1319,
               "5ead7c005a76aa5b09d33702e763f3a92438310dfe22081ddbd7fb3845a8df1b",
               "e3ec5c25e8166ed663774851f30d2d818b20d2e14bd6fac53c119351601fc84c"),
        _known("humaneval", "HumanEval", 164,
               "ce05ed2974a65963beca92b9238587ba786160d6d34daaa6d8ebadb2ff0950de",
               "7b9e73c2ac7d531c6123df928f12ce6ccfc3c997f831ba3e2075101b1b1a1035", "openaihumaneval", kind="code"),
        _known("humaneval_plus", "HumanEval+", 164,
               "0003123fbe320a3c2e774be4ab03d45a38e8d560af588eed5fcecc0f948fac60",
               "e82114d4f74620f019d80103d2461067e66e84eed942bcd48345885f6f813c12", "humaneval+", kind="code"),
        _known("mbpp", "MBPP", 500,
               "8616379903aff7d092bb3d52f0a2ec34dcc93f22a1df26fcfbe0dc96b9a41def",
               "ab49f59544643947848fb5cb24f270a381ab25dad3c8f7c99c1594d3351626ac", kind="code"),
        _known("mbpp_sanitized", "MBPP (sanitized)", 257,
               "8607c82d35f927427a8d883146fda0138ce40e931fc6a28954916655da6765e2",
               "300e11a06601a659d3256a3b0ced6b290e12c4e338a32acab895bdce1da833fe", "sanitizedmbpp", kind="code"),
        _known("mbpp_plus", "MBPP+", 378,
               "563296aebd2a576f492746d5fb455db2448e3b6e78829524365cb68de344a33b",
               "93769e5425d3d4e02d03f94db72737df70b12fe392c3e15e6982f05d99d77803", "mbpp+", kind="code"),
        _known("livecodebench_v1_public", "LiveCodeBench v1 (public tests)", 400,
               "6d82ecea524d5e2557f2c5c20b9e9f39eafb14ed0fdb97eaebdcc357cfba4d39",
               "02ed925891cd7b84eea16edda71c074030d9a786cb8d36c43243288d9f4e2b3c", kind="code"),
        _known("livecodebench", "LiveCodeBench (own file)", 0, "", "", "lcb", "codegenerationlite", kind="code"),
    )
}  # fmt: skip
"""Sets by name, in the order of the tables."""
