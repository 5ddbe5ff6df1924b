"""What TRL's trainer must have: compared with the signatures of every release, as `make test-matrix` writes them."""

import inspect
import json
from pathlib import Path

import pytest
import trl
from packaging.version import Version
from trl import GRPOTrainer

from exgrpo_trl.compatibility import HOOKS, check_hooks

SIGNATURES = json.loads((Path(__file__).parent / "matrix" / "signatures.json").read_text())


def method_of(names):
    """A method that takes what TRL's takes."""
    method = lambda *args, **kwargs: None  # noqa: E731
    kinds = {"*": inspect.Parameter.VAR_POSITIONAL, "**": inspect.Parameter.VAR_KEYWORD}
    parameters = []
    for name in names:
        kind = kinds.get(name[: len(name) - len(name.lstrip("*"))])
        is_named = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
        usual = inspect.Parameter.KEYWORD_ONLY if is_named else inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(name.lstrip("*"), usual if kind is None else kind))
    method.__signature__ = inspect.Signature(parameters)
    return method


def trainer_with(signatures):
    return type("Trainer", (), {name: method_of(names) for name, names in signatures.items() if names is not None})


def test_every_release_is_there():
    releases = sorted(map(Version, SIGNATURES))
    assert releases[0] == Version("1.0.0")
    assert {release.minor for release in releases} >= set(range(17))
    assert all(signatures.keys() == HOOKS.keys() for signatures in SIGNATURES.values()), "run `make test-matrix`"


@pytest.mark.parametrize("release", SIGNATURES)
def test_a_release_has_what_replay_wraps(release):
    check_hooks(trainer_with(SIGNATURES[release]))


def test_signatures_are_those_of_the_installed_release():
    if trl.__version__ not in SIGNATURES:
        pytest.skip(f"trl {trl.__version__} is newer than the last run of `make test-matrix`")
    check_hooks(GRPOTrainer)
    for name, names in SIGNATURES[trl.__version__].items():
        found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
        assert found == [of_one.lstrip("*") for of_one in names], name


@pytest.mark.parametrize("release", ["1.0.0", "1.14.2", "1.16.0"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_release_that_lacks_a_method_or_a_parameter_is_refused(release, name):
    signatures = SIGNATURES[release]
    with pytest.raises(RuntimeError, match=rf"relies on {name}\(\) of Trainer, which trl {trl.__version__}"):
        check_hooks(trainer_with(signatures | {name: None}))
    if any(of_one.startswith("*") for of_one in signatures[name]):
        return
    for parameter in HOOKS[name]:
        rest = [of_one for of_one in signatures[name] if of_one != parameter]
        with pytest.raises(RuntimeError, match=rf"parameters \['{parameter}'\] of {name}\(\)"):
            check_hooks(trainer_with(signatures | {name: rest}))


@pytest.mark.parametrize("name", [name for name, parameters in HOOKS.items() if parameters])
def test_what_takes_anything_takes_what_replay_needs(name):
    """TRL 1.14 passes everything on; but where a parameter is looked for by its name, it has to be there."""
    trainer = trainer_with(SIGNATURES["1.16.0"] | {name: ["self", "*args", "**kwargs"]})
    if name in ("_generate_single_turn", "_calculate_rewards"):
        with pytest.raises(RuntimeError, match=rf"of {name}\(\)"):
            check_hooks(trainer)
    else:
        check_hooks(trainer)
