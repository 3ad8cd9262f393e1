"""Runs the recipes, each with an empty store, or measures what memory and retrieval bring.

    python -m hybrid_rag [--model nano] [--adapter DIR]
    python -m hybrid_rag table [--conversations 20] [--pools]

Exits with 1 where a recipe's promise is not kept.
"""

from __future__ import annotations

import argparse
import sys
from tempfile import TemporaryDirectory

from agentmem_chroma import FactStore, local_embeddings
from hybrid_rag import fact_wins, forgetting, memory_and_facts, namespaces, written_or_shown
from hybrid_rag.parts import chat_model
from hybrid_rag.table import table

RECIPES = (memory_and_facts, written_or_shown, fact_wins, namespaces, forgetting)


def main() -> int:
    """Run them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hybrid_rag", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="nano", help='"nano", a directory or a hub id')
    parser.add_argument("--adapter", help="a directory or a hub id; nano brings its own")
    parser.add_argument("what", nargs="?", choices=("recipes", "table"), default="recipes")
    parser.add_argument("--conversations", type=int, default=20, help="of each kind, for the table")
    parser.add_argument("--pools", action="store_true", help="for the table: values that nano was trained on")
    given = parser.parse_args()
    llm, embeddings = chat_model(given.model, given.adapter), local_embeddings()
    if given.what == "table":
        print(table(llm, embeddings, given.conversations, pools=given.pools))
        return 0
    kept = []
    for module in RECIPES:
        print((module.__doc__ or "").strip().partition("\n")[0])
        with TemporaryDirectory() as folder, FactStore(folder, embeddings=embeddings) as store:
            kept.append(module.recipe(llm, store))
        print("  kept\n" if kept[-1] else "  FALLS SHORT\n")
    llm.close()
    print(f"{sum(kept)} of {len(kept)} recipes do what they say")
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
