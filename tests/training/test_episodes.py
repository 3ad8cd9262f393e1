"""The `facts` source: every act occurs, answers can be recovered, the two parts share nothing, the English is sound."""

from __future__ import annotations

import json
import random
import re
from collections import Counter

import pytest

from agentmem.errors import ConfigError
from agentmem.training.episodes import EpisodeConfig, FactEpisode, FactEpisodes
from agentmem.training.facts import wordings as say
from agentmem.training.facts.attributes import ATTRIBUTES, attributes
from agentmem.training.facts.rules import RULES
from agentmem.training.facts.splits import Split, split_of, wordings
from agentmem.training.facts.values import OPEN_KINDS, POOLS, Values, Vocabulary

EPISODES = [FactEpisodes(seed=1).episode(number) for number in range(600)]


def told(episode: FactEpisode) -> str:
    return "\n".join(turn.user.content for turn in episode.turns)


def test_every_act_and_every_rule_occurs() -> None:
    turns = Counter(turn.act for episode in EPISODES for turn in episode.turns)
    questions = Counter(question.act for episode in EPISODES for question in episode.questions)
    assert set(turns) == {"tell", "tell_several", "change", "correct", "rule", "small_talk", "unrelated"}
    assert set(questions) == {"ask", "choice", "tool_call", "never_told", "rule_followed"}
    assert min(turns.values()) > 30
    assert min(questions.values()) > 30
    given = {t.user.content for episode in EPISODES for t in episode.turns if t.act == "rule"}
    for rule in RULES:
        patterns = [re.escape(text).replace(re.escape("{v}"), r"\w+") for text in rule.tellings]
        assert any(re.fullmatch(pattern, text) for pattern in patterns for text in given), rule.name


def test_episodes_are_determined_by_seed_and_number() -> None:
    assert FactEpisodes(seed=1).episode(17) == EPISODES[17]
    assert FactEpisodes(seed=2).episode(17) != EPISODES[17]
    assert EPISODES[16] != EPISODES[17]


def test_values_are_fresh() -> None:
    config = EpisodeConfig(open_values=1.0, kinds=("word", "name", "title", "number", "code"))
    source = FactEpisodes(config=config)
    values = [fact.value for n in range(300) for turn in source.episode(n).turns for fact in turn.facts]
    assert len(set(values)) > 0.6 * len(values)


def test_answers_can_be_recovered_from_what_was_told() -> None:
    changed = 0
    for episode in EPISODES:
        for question in episode.questions:
            if question.act == "never_told":
                assert question.attribute is not None
                assert all(fact.attribute != question.attribute for turn in episode.turns for fact in turn.facts)
                assert "not told" in question.reply.content
            elif question.act == "rule_followed":
                assert any(turn.act == "rule" for turn in episode.turns)
                assert question.value in question.reply.content
            else:
                assert question.value in told(episode)
                last = [f for turn in episode.turns for f in turn.facts if f.attribute == question.attribute][-1]
                assert question.value == last.value != question.old
                said = question.reply.content or json.dumps([dict(c.arguments) for c in question.reply.tool_calls])
                assert question.value in said
                if question.act == "ask":
                    assert question.value not in question.user.content
                    changed += bool(question.old)
                    assert question.old not in question.reply.content.split()
    assert changed > 50


def test_rules_shape_the_reply() -> None:
    replies = {rule.name: rule.apply("Bees make honey. They also make wax.", "amber") for rule in RULES}
    assert replies["one_sentence"] == "Bees make honey."
    assert replies["capitals"].isupper()
    assert replies["closing_word"].endswith("Amber.")
    assert replies["list"] == "- Bees make honey.\n- They also make wax."
    files = {rule.name: rule.apply("price list", ".csv") for rule in RULES if rule.about_files}
    assert files == {"snake_case": "price_list.csv", "kebab_case": "price-list.csv", "camel_case": "PriceList.csv"}


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_the_parts_of_every_open_kind_are_disjoint(kind: str) -> None:
    train, heldout = (
        {Values(split).draw(random.Random(seed), kind) for seed in range(400)} for split in ("train", "heldout")
    )
    assert not train & heldout
    assert len(heldout) > 5
    if kind == "phrase":
        assert {split_of(word, "value") for phrase in heldout for word in phrase.split()} == {"heldout"}


def test_wordings_and_attributes_are_divided() -> None:
    for texts in [say.TELL, say.ASK, say.CHANGE, say.CORRECT, *(a.questions for a in ATTRIBUTES)]:
        train, heldout = (set(wordings(texts, split)) for split in ("train", "heldout"))
        assert train
        assert heldout
        if len(texts) > 1:
            assert not train & heldout
            assert train | heldout == set(texts)
    assert not set(attributes("train")) & set(attributes("heldout"))
    assert len(attributes()) == len(ATTRIBUTES) > 100
    assert 5 < len(attributes("heldout")) < 25


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_heldout_sources_draw_from_their_part_alone(split: Split) -> None:
    source = FactEpisodes(values=split, wordings=split, attributes=split, config=EpisodeConfig(facts=(1, 2)))
    for number in range(60):
        for turn in source.episode(number).turns:
            for fact in turn.facts:
                assert split_of(fact.attribute.noun, "attribute") == split
                if fact.attribute.kind in ("word", "name", "number", "version", "code", "time"):
                    assert split_of(fact.value, "value") == split


def test_rows_are_conversations_of_which_the_last_reply_counts() -> None:
    tools = 0
    for episode in EPISODES[:200]:
        for row, question in zip(episode.rows(), episode.questions, strict=True):
            row = json.loads(json.dumps(row))
            *before, user, reply = row["messages"]
            assert len(before) == 2 * len(episode.turns)
            assert user == {"role": "user", "content": question.user.content}
            assert reply["train"]
            assert not any(message.get("train") for message in before)
            if question.act == "tool_call":
                tools += 1
                (call,) = reply["tool_calls"]
                assert question.value in json.loads(call["function"]["arguments"]).values()
                assert row["tools"][0]["function"]["name"] == call["function"]["name"]
    assert tools


def test_english_is_sound() -> None:
    for episode in EPISODES:
        texts = [message.content for turn in episode.turns for message in turn.messages]
        texts += [question.user.content for question in episode.questions]
        for text in texts:
            assert text
            assert "{" not in text
            assert "  " not in text
            assert not text[0].islower()
            assert not re.search(r"\ba [aeio]\w|\ban [bcdfgjklmnpqrstvwxz]", text), text
            assert not re.search(r"[.!?] (?:i|we|my|the|they) ", text), text
        for turn in episode.turns:
            # The assistant speaks of the user's things.
            assert not re.search(r"\b(?:[Mm]y|[Oo]ur|I am wearing)\b", turn.reply.content)


def test_a_tokenizer_widens_the_vocabulary() -> None:
    class Tokenizer:
        tokens = (" harbour", " Ottilie", "ing", " 12", " x", " ABC", "Foo")

        def __len__(self) -> int:
            return len(self.tokens)

        def decode(self, ids: list[int]) -> str:
            return self.tokens[ids[0]]

    vocabulary = Vocabulary.from_tokenizer(Tokenizer())
    assert "harbour" in vocabulary.words
    assert "Ottilie" in vocabulary.names
    assert not {"x", "ABC", "Foo", "ing"} & {*vocabulary.words, *vocabulary.names}
    assert len(vocabulary.words) == len(Vocabulary().words) + 1


def test_impossible_configs_are_refused() -> None:
    with pytest.raises(ConfigError, match="facts must be a range"):
        EpisodeConfig(facts=(3, 1))
    with pytest.raises(ConfigError, match="changes must be a share"):
        EpisodeConfig(changes=1.5)
    with pytest.raises(ConfigError, match="unknown kind of values 'mood'"):
        EpisodeConfig(kinds=("mood",))
    with pytest.raises(ConfigError, match="at least one question"):
        EpisodeConfig(questions=0)
    with pytest.raises(ConfigError, match="needs more attributes"):
        FactEpisodes(config=EpisodeConfig(facts=(4, 4), kinds=("month",)))
    assert POOLS["month"]
