"""The `facts` source: every act occurs, answers can be recovered, the two parts share nothing, the English is sound."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from agentmem.errors import ConfigError
from agentmem.training.episodes import EpisodeConfig, FactEpisode, FactEpisodes
from agentmem.training.facts import wordings as say
from agentmem.training.facts.attributes import ATTRIBUTES, attributes, second_person
from agentmem.training.facts.rules import RULES, Rule
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
                # It parts from an answer only where the value would stand.
                frame = f"{second_person(question.attribute.noun)} is not"
                assert question.reply.content.lower().startswith(frame.lower())
            elif question.act == "rule_followed":
                assert any(turn.act == "rule" for turn in episode.turns)
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


PLAIN = "Bees make honey. They also make wax."
FOLLOWING = {
    "one_sentence": ["Bees make honey.", "Honey!"],
    "capitals": ["BEES MAKE HONEY."],
    "lower_case": ["bees make honey. they like it."],
    "closing_word": ["Bees make honey. Amber.", "honey, amber"],
    "opening_word": ["Amber: bees make honey.", "amber honey"],
    "address": ["Well, Amber, bees do that."],
    "list": ["- Honey.\n- Wax.", "1. Honey\n2. Wax", "* Honey"],
    "exclamation": ["Bees make honey. They do!"],
    "ask_back": ["Bees make honey. Do you like it?"],
    "snake_case": ["Call it price_list.csv", "price_list.csv or old_price_list.csv."],
    "kebab_case": ["Call it price-list.csv"],
    "camel_case": ["`PriceList.csv`"],
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_knows_the_replies_that_follow_it(rule: Rule) -> None:
    for reply in FOLLOWING[rule.name]:
        assert rule.followed(reply, "amber"), reply
    words, suffix = ("price list", ".csv") if rule.about_files else (PLAIN, "amber")
    assert rule.followed(rule.apply(words, suffix), "amber")
    for reply in (PLAIN, "", f"{PLAIN} Call it Price_list.csv", f"{PLAIN} {rule.name}"):
        assert not rule.followed(reply, "amber"), reply


def test_rules_are_told_apart() -> None:
    files = {rule.name: rule.apply("price list", ".csv") for rule in RULES if rule.about_files}
    assert files == {"snake_case": "price_list.csv", "kebab_case": "price-list.csv", "camel_case": "PriceList.csv"}
    for rule in RULES:
        for name, reply in files.items():
            assert not rule.about_files or rule.followed(f"Call it {reply}.") == (rule.name == name)


def test_questions_about_rules_are_judged_by_the_rule() -> None:
    questions = [q for episode in EPISODES for q in episode.questions if q.act == "rule_followed"]
    for question in questions:
        assert question.check is not None
        assert question.check(question.reply.content), question
        assert not question.check("I am not sure. I would have to look that up first. Then I can tell"), question


def test_only_replies_that_say_so_count_as_never_told() -> None:
    for text in (
        "You have not told me your dog's name.",
        "Your dog's name is not something you have told me.",
        "Your dog's name is not anything you've ever mentioned.",
        "You haven't mentioned that yet.",
        "You never said what it is.",
        "I was not given that.",
        "I don't know your dog's name.",
        "I have no record of it.",
        "You didn't tell me.",
    ):
        assert say.says_it_was_not_told(text), text
    for episode in EPISODES:
        replies = [turn.reply.content for turn in episode.turns]
        for question in episode.questions:
            if question.act == "never_told":
                assert question.check is say.says_it_was_not_told
                assert question.check(question.reply.content)
            else:
                replies.append(question.reply.content)
        for reply in replies:
            assert not say.says_it_was_not_told(reply), reply


def test_no_value_is_a_word_of_the_wordings() -> None:
    class Tokenizer:  # whose words are mostly those of the frame
        words = (
            " what",
            " name",
            " dog",
            " called",
            " remember",
            " harbour",
            " lantern",
            " marble",
            " Your",
            " Ottilie",
        )

        def __len__(self) -> int:
            return len(self.words)

        def decode(self, ids: list[int]) -> str:
            return self.words[ids[0]]

    source = FactEpisodes(vocabulary=Vocabulary.from_tokenizer(Tokenizer()), config=EpisodeConfig(open_values=1.0))
    drawn = {
        word
        for number in range(400)
        for turn in source.episode(number).turns
        for fact in turn.facts
        for word in fact.value.lower().split()
    }
    assert {"harbour", "lantern", "ottilie"} & drawn
    assert not {"what", "name", "dog", "called", "remember", "your"} & drawn


def test_no_value_of_an_episode_is_part_of_another() -> None:
    source = FactEpisodes(config=EpisodeConfig(facts=(6, 6), changes=1.0, kinds=("number", "word")))
    for number in range(100):
        values = list(dict.fromkeys(f.value for turn in source.episode(number).turns for f in turn.facts))
        assert not [(a, b) for a in values for b in values if a is not b and a in b]


def test_digits_and_values_of_two_words_occur_often() -> None:
    values = [question.value for episode in EPISODES for question in episode.questions if question.value]
    numbers = [value for value in values if re.fullmatch(r"\d{2,4}", value)]
    pairs = [value for value in values if re.fullmatch(r"[A-Za-z]+ [A-Za-z]+", value)]
    assert len(numbers) > 0.15 * len(values)
    assert {len(value) for value in numbers} == {2, 3, 4}
    assert len(pairs) > 0.12 * len(values)
    for two_words, count in ((0.0, 1), (1.0, 2)):
        source = FactEpisodes(config=EpisodeConfig(two_words=two_words, kinds=("word", "name")))
        facts = [fact for number in range(50) for turn in source.episode(number).turns for fact in turn.facts]
        assert {len(fact.value.split()) for fact in facts} == {count}


def test_kinds_can_be_weighted_and_episodes_kept_to_one_domain() -> None:
    def share(config: EpisodeConfig) -> float:
        source = FactEpisodes(config=config)
        facts = [fact for number in range(200) for turn in source.episode(number).turns for fact in turn.facts]
        return sum(fact.attribute.kind == "number" for fact in facts) / len(facts)

    assert share(EpisodeConfig(kind_weights=(("number", 6.0),))) > 1.5 * share(EpisodeConfig())
    source = FactEpisodes(config=EpisodeConfig(one_domain=1.0, facts=(4, 4)))
    for number in range(50):
        assert len({fact.attribute.domain for turn in source.episode(number).turns for fact in turn.facts}) == 1


def test_choices_are_mostly_among_what_was_said() -> None:
    source = FactEpisodes(config=EpisodeConfig(facts=(3, 3), changes=0.0, acts=(("choice", 1.0),), rules=0.0))
    said = []
    for number in range(100):
        episode = source.episode(number)
        for question in episode.questions:
            assert question.value in question.user.content
            assert question.old in question.user.content
            said.append(question.old in told(episode))
    assert 0.6 < sum(said) / len(said) < 0.95


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_the_parts_of_every_open_kind_are_disjoint(kind: str) -> None:
    train, heldout = (
        {Values(split).draw(random.Random(seed), kind) for seed in range(120)} for split in ("train", "heldout")
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
    assert len(attributes()) == len(ATTRIBUTES) > 140
    for general in (say.TELL, say.ASK):
        assert len(wordings(general, "train")) >= 12
        assert len(wordings(general, "heldout")) >= 5
    for attribute in ATTRIBUTES:
        for texts in (attribute.statements, attribute.questions):
            assert len(wordings(texts, "train")) >= 2
            assert wordings(texts, "heldout")
    questions = [question for attribute in ATTRIBUTES for question in attribute.questions]
    assert len(set(questions)) == len(questions)  # each asks for one attribute only
    assert 5 < len(attributes("heldout")) < 25


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_heldout_sources_draw_from_their_part_alone(split: Split) -> None:
    source = FactEpisodes(
        values=split, wordings=split, attributes=split, config=EpisodeConfig(facts=(1, 2), two_words=0.0)
    )
    for number in range(60):
        for turn in source.episode(number).turns:
            for fact in turn.facts:
                assert split_of(fact.attribute.noun, "attribute") == split
                if fact.attribute.kind in ("word", "name", "number", "version", "code", "time"):
                    assert split_of(fact.value, "value") == split


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
    with pytest.raises(ConfigError, match="acts are ask, choice"):
        EpisodeConfig(acts=(("asks", 1.0),))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kind_weights must be above 0"):
        EpisodeConfig(kind_weights=(("number", 0.0),))
    with pytest.raises(ConfigError, match="needs more attributes"):
        FactEpisodes(config=EpisodeConfig(facts=(4, 4), kinds=("month",)))
    assert POOLS["month"]


def test_a_course_goes_from_one_fact_to_many() -> None:
    config = EpisodeConfig(
        facts=(1, 6), fillers=(2, 2), grow=300, systems=0.5, repeats=2, questions=12, acts=(("ask", 1.0),)
    )
    source = FactEpisodes(seed=2, config=config)
    told_facts = [len({fact.attribute for turn in source.episode(n).turns for fact in turn.facts}) for n in range(400)]
    assert set(told_facts[:100]) == {1}
    assert max(told_facts[:200]) < 6
    assert max(told_facts[300:]) == 6
    assert {turn.act for n in range(100) for turn in source.episode(n).turns} == {"tell"}
    assert source.episode(-1).turns == FactEpisodes(seed=2, config=replace(config, grow=0)).episode(-1).turns
    episode = source.episode(399)
    asked = Counter(question.attribute for question in episode.questions if question.act == "ask")
    assert max(asked.values()) == 2, "each fact is asked for in two wordings"
    systems = {source.episode(n).system for n in range(60)}
    assert None in systems
    assert len(systems) > 5
