"""The import rule, where flax modules may live, and the sizes of files and functions."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("kernels", "rcm_jax", "configs", "scripts") for p in (ROOT / folder).rglob("*.py"))
OURS = {"kernels", "rcm_jax", "configs", "scripts"}
MOST_LINES, MOST_FUNCTION_LINES = 500, 60

# What a module may import of ours, by the longest prefix of its name. Modules not listed are kept from the three below.
FIELDS = "rcm_jax.util.ranges"  # what fields of configs may be: of the standard library alone
GROUND = {"rcm_jax.method", "rcm_jax.parallel", "rcm_jax.util"}
BELOW_RUN = GROUND | {f"rcm_jax.{wing}" for wing in ("models", "train", "data", "media", "convert", "kernels")}
ALLOWED = {
    "kernels": {"kernels"},
    "rcm_jax.method": {"rcm_jax.method", FIELDS},
    "rcm_jax.parallel": {"rcm_jax.parallel", FIELDS},
    "rcm_jax.util": {"rcm_jax.util"},
    "rcm_jax.models": {"rcm_jax.models", "rcm_jax.kernels", "rcm_jax.parallel", FIELDS},
    "rcm_jax.data": GROUND | {"rcm_jax.data"},
    "rcm_jax.train": GROUND | {"rcm_jax.train"},
    "rcm_jax.media": {"rcm_jax.media", "rcm_jax.models", "rcm_jax.util"},
    "rcm_jax.convert": {"rcm_jax.convert", "rcm_jax.models", "rcm_jax.util"},
    "rcm_jax.run": BELOW_RUN | {"rcm_jax.run"},
    "rcm_jax.evaluate": BELOW_RUN | {"rcm_jax.run", "rcm_jax.evaluate"},
    "rcm_jax.plan": BELOW_RUN | {"rcm_jax.run", "rcm_jax.plan"},
    "rcm_jax.build": BELOW_RUN | {"rcm_jax.run", "rcm_jax.build"},
}
NEVER_IN_THE_LIBRARY = {"configs", "scripts", "ml_collections"}
# Third-party packages by the same prefixes.
THIRD_PARTY = {"kernels": {"jax", "jaxtyping", "numpy"}, "rcm_jax.models": {"jax", "jaxtyping", "flax", "numpy"}}
OPTIONAL = {"kernels": {"fa4_jax", "jax_triton", "triton"}}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def imports(path):
    """Full names of what a file imports, `from a import b` as a.b where a.b is a module of ours, else a."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:  # kernels/ has two names
                assert node.level == 1 and path.parent.name == "kernels", f"{path}: relative import"
                yield ".".join(filter(None, ["kernels", node.module]))
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                base = ROOT.joinpath(*full.split("."))
                yield full if base.with_suffix(".py").exists() or base.is_dir() else node.module


def rule(table, name):
    """The entry of the longest prefix of a module's name."""
    prefixes = [prefix for prefix in table if name == prefix or name.startswith(f"{prefix}.")]
    return table[max(prefixes, key=len)] if prefixes else None


def within(name, allowed):
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def ids(path):
    return str(path.relative_to(ROOT))


sources = pytest.mark.parametrize("path", SOURCES, ids=ids)


def test_there_are_sources_to_check():
    names = {module_name(path) for path in SOURCES}
    assert {
        "kernels.attention",
        "rcm_jax.method.objectives.scm",
        "rcm_jax.models.dit",
        "scripts.train",
        "configs.digits",
    } <= names
    stale = set(ALLOWED) - names
    assert not stale, f"rules for modules that are gone: {stale}"


@pytest.mark.smoke
@sources
def test_a_module_imports_only_what_its_layer_may(path):
    name = module_name(path)
    ours = {imported for imported in imports(path) if imported.split(".")[0] in OURS}
    allowed = rule(ALLOWED, name)
    if allowed is not None:
        assert not {i for i in ours if not within(i, allowed)}
    if name.split(".")[0] in ("kernels", "rcm_jax"):
        assert not {i for i in imports(path) if within(i, NEVER_IN_THE_LIBRARY)}


@sources
def test_kernels_and_models_need_nothing_but_jax_and_models_flax(path):
    name = module_name(path)
    allowed = rule(THIRD_PARTY, name)
    if allowed is None:
        return
    packages = {imported.split(".")[0] for imported in imports(path)} - OURS
    optional = OPTIONAL.get(name.split(".")[0], set())
    assert not packages - allowed - optional - set(sys.stdlib_module_names)


@sources
def test_flax_modules_are_defined_only_in_models(path):
    if module_name(path).startswith("rcm_jax.models"):
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases]
            assert not [base for base in bases if base.split(".")[-1] == "Module"], f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("compact", "make_rng"), f"{path}:{node.lineno}"


def test_models_use_no_mutable_collections_and_no_random_state():
    for path in (ROOT / "rcm_jax/models").rglob("*.py"):
        used = {node.attr for node in ast.walk(tree_of(path)) if isinstance(node, ast.Attribute)}
        assert not used & {"make_rng", "variable", "put_variable", "sow"}, path


def test_the_method_never_mentions_a_mesh():
    for path in (ROOT / "rcm_jax/method").rglob("*.py"):
        if path.name != "__init__.py":
            text = path.read_text().lower()
            assert not [word for word in ("mesh", "shard", "pmean", "psum", "axis_name") if word in text], path


@sources
def test_files_are_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@sources
def test_functions_are_short_enough_to_read(path):
    if module_name(path).startswith(("kernels", "configs")):  # a config is a table
        return
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_FUNCTION_LINES, f"{node.name} has {lines} lines"
