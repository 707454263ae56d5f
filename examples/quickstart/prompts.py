"""Prompts with instructions that a program can verify. Training and held-out prompts share no topic."""

TRAIN_TOPICS = [
    "the ocean", "coffee", "bicycles", "winter", "music", "libraries", "bread", "trains", "bees", "chess", "rain",
    "maps", "mountains", "tea", "elephants", "the moon", "gardening", "swimming", "cheese", "volcanoes", "bridges",
    "photography", "owls", "deserts", "soccer", "clocks", "forests", "painting", "penguins", "rivers", "kites",
    "airplanes", "honey", "castles", "dreams", "dolphins", "snow", "poetry", "windmills", "spiders",
]  # fmt: skip

HELD_OUT_TOPICS = [
    "the sun", "chocolate", "cars", "summer", "dancing", "museums", "apples", "boats", "butterflies", "football",
    "thunder", "compasses", "islands", "lemonade", "horses", "comets", "cooking", "running", "rice", "earthquakes",
    "lighthouses", "cinema", "wolves", "glaciers", "tennis", "mirrors", "jungles", "sculpture", "parrots", "lakes",
    "balloons", "rockets",
]  # fmt: skip

# Name and value for the reward, and what the model is told. The model follows each of them sometimes, so that most
# lists hold both outcomes. And they pull the length of answers in different ways: were short answers the better ones
# under every instruction, answers would soon shrink to nothing.
INSTRUCTIONS = [
    ("no_commas", None, "Do not use any commas."),
    ("includes", "because", 'Include the word "because".'),
    ("max_words", 20, "Use at most 20 words."),
    ("includes", "people", 'Include the word "people".'),
]


def make_prompts(topics: list[str]) -> list[dict]:
    """Two prompts for each topic, with different instructions; every instruction occurs equally often."""
    prompts = []
    for i, topic in enumerate(topics):
        for name, value, sentence in (INSTRUCTIONS[i % 4], INSTRUCTIONS[(i + 1 + i // 4 % 3) % 4]):
            content = f"Tell me a short fact about {topic}. {sentence}"
            prompt = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": content}]
            prompts.append({"prompt": prompt, "instruction": name, "value": value})
    return prompts
