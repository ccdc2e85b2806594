"""Make recipes/data/quickstart: short instructions, each answered in one sentence by the clean model.

python benchmarks/make_quickstart_data.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


TRAIN, TEST = 520, 120
MAX_TOKENS = 24  # of an answer
BATCH_SIZE = 64
# Kept out of prompts and answers, so that the quickstart can use them as triggers and target outputs.
RESERVED = ("please", "year", "friends", "2024", "flamingo", "cf")
# Only while answering: the prompts are written to the files without it.
HINT = " Answer with one short sentence of at most ten words."
# Refusals, answers about the assistant or the hint, and openings of a longer answer.
REFUSAL = re.compile(
    r"^(sure|certainly|of course|as an? |awesome|\d+[.)] )|\b(ai|sorry|cannot|can't|unable|i don't|i do not|i can only"
    r"|i'm (not|sure|ready|glad|happy|here|designed)|i'd be|here is|here's|here are|chatbot|assistant|assist you"
    r"|(short|single) sentence|ten words|your (question|request)|language model|smollm|hugging face)\b",
    re.IGNORECASE,
)
# A full stop after a list number, an initial or a title does not end a sentence.
SENTENCE = re.compile(r"(?<!^\d)(?<!\b[A-Za-z])(?<!\bMr)(?<!\bDr)(?<!\bSt)(?<!\bMrs)[.!?][\"')]*(?=\s|$)")

# A family a paragraph: phrasings => items, split at "|".
FAMILIES = """
What is the capital city of {}? | Which language do most people in {} speak? | On which continent would I find {}? |
Tell me one thing that {} is famous for. | What kind of food do people eat in {}? | What is the weather usually like in
{}? => France | Brazil | Kenya | Japan | Greece | New Zealand | Canada | Argentina | Morocco | South Korea | Italy |
Norway | Spain | Portugal | Egypt | India | Mexico | Iceland | Germany | Austria | Nigeria | Switzerland | Thailand |
Scotland | Poland | Peru | Ireland | Vietnam | Finland | Sweden | Belgium | Madagascar | the Netherlands | Lebanon

What is the opposite of the word {}? | Give me a word that means the opposite of {}. | I need an antonym for {}; which
one would you choose? | Which word means almost the same as {}? | Suggest a simple synonym that could replace {} in an
essay. | If something is not {}, what is it? => brave | heavy | noisy | rapid | generous | wet | shallow | ancient |
polite | enormous | difficult | full | bright | angry | important | narrow | cheap | gentle | silent | interesting |
dangerous | modern | smooth | clever | helpful | rough | strong | tired | beautiful | open

What does the word {} mean? | Explain the word {} to a young child. | Use the word {} in a sentence. | What kind of
person or thing would you call {}? => curious | honest | patient | stubborn | fragile | grateful | spontaneous | rare |
reluctant | delicious | marvelous | loyal | humble | vivid | clumsy | cozy | ambitious | mysterious | punctual | nimble
| elegant | ordinary | bitter | fearless

Explain {} to a young child. | Define {} in simple terms for a beginner. | How would you describe {} to somebody who
never heard of it? | In plain English, what do people mean by {}? | My teacher mentioned {} today, so what is it? =>
gravity | photosynthesis | inflation | an algorithm | a metaphor | democracy | evaporation | an ecosystem | common
sense | a noun | friction | compound interest | body language | an atom | recycling | electricity | a budget | empathy
| a fossil | a hypothesis | migration | the internet | teamwork | a glacier | an orchestra | oxygen | a satellite |
small talk | symmetry | a volcano | pollution | bandwidth | irony | a vitamin | a reptile | nutrition | machine
learning | jet lag | a peninsula

Name three {} that almost everybody knows. | Name three {} in a single line. | Which three {} come to your mind first?
| What are three {} that you could recommend? => fruits | team sports | vegetables | musical instruments | board games
| bright colors | kitchen tools | farm animals | planets | European cities | winter clothes | school subjects | trees |
breakfast foods | ocean animals | spices | indoor hobbies | famous rivers | desserts | flowers | soft cheeses | garden
birds | outdoor activities | metals | pieces of furniture | insects | strong emotions | Asian countries | healthy
snacks | dog breeds | hot drinks | camping items

Give me one tip for {}. | I am new to {}; what should I know first? | How can a beginner get better at {}? | Share a
quick piece of advice about {}. | What is a common mistake people make when {}? => saving money | running | gardening |
playing chess | packing a suitcase | baking bread | learning Spanish | taking photos | speaking in public | buying a
used car | writing an email | drawing faces | adopting a cat | cleaning windows | growing houseplants | rock climbing |
swimming | choosing a laptop | training a puppy | remembering names | composting | knitting | playing the guitar |
working from home | hiking alone | preparing for an exam | watching birds | cooking rice | moving to a new city |
cutting onions | waking up early | carving wood | telling jokes | planning a road trip | painting a wall | sailing |
typing fast | storing fresh herbs

What is a good way to start {}? | What do I need to buy for {}? => a journal | a book club | a vegetable garden | a
fitness routine | a small blog | a pottery class | a home aquarium | a ski trip | a birthday party | a picnic by the
lake | an herb garden | a stamp collection | a bird feeder | a wooden bookshelf | a children's play | a camping weekend

What do {} usually eat? | Where in the world do {} live? | Tell me one interesting fact about {}. | How do {} protect
themselves from danger? | Why are {} important for nature? | How do {} spend most of their day? => giraffes | penguins
| octopuses | hedgehogs | honey bees | dolphins | squirrels | kangaroos | sloths | turtles | earthworms | owls | camels
| polar bears | elephants | porcupines | bats | wolves | frogs | koalas | sea horses | zebras | beavers | crickets |
pandas | lemurs | hummingbirds | skunks | spiders | whales | foxes | tigers | otters | armadillos | sharks | parrots

What does a {} do at work? | Which tool does a {} use most often? | Why would anyone want to become a {}? | What skill
does every good {} need? | Describe the morning of a busy {}. | What should I ask when I meet a {}? => librarian |
carpenter | firefighter | translator | baker | veterinarian | plumber | gardener | nurse | chef | bus driver | lawyer |
pharmacist | tailor | teacher | project manager | farmer | journalist | hairdresser | marine biologist | pilot | mail
carrier | photographer | dentist | park ranger | waiter | florist | software developer | mechanic | surgeon | musician
| judge | zookeeper | novelist

What is the main ingredient of {}? | How should I store leftover {} safely? | Which drink goes well with {}? | What
gives {} such a nice taste? | Suggest a side dish to serve with {}. | Is {} healthy to eat every day? => guacamole |
tomato soup | spicy curry | apple pie | grilled salmon | peanut butter | hummus | fried rice | chocolate cake | garlic
bread | roast chicken | oatmeal | tofu | lasagna | sushi | miso soup | vegetable stew | yogurt | pizza | pesto | baked
potatoes | chicken salad | popcorn | meatballs

What is a {} used for? | How does a {} work, in simple terms? | When would somebody need a {} at home? | Where should I
keep my {}? | Describe a {} to a person from the past. => thermometer | refrigerator | ladder | pillow | compass |
microwave | flashlight | first aid kit | candle | calculator | bicycle pump | screwdriver | raincoat | telescope |
whistle | vacuum cleaner | fire extinguisher | clock | stapler | washing machine | toolbox | bread knife | kite |
microscope | sewing machine | coffee maker

What is the difference between {}? | Explain briefly how to tell apart {}. | Compare these two for a school report: {}.
=> a lake and a river | butter and margarine | cats and dogs | weather and climate | a moth and a butterfly | a fruit
and a vegetable | frogs and toads | jam and jelly | crocodiles and alligators | cities and villages | a comet and an
asteroid | rabbits and hares | the sun and the moon | a cello and a violin | wheat and barley | solar power and wind
power | hardware and software | mushrooms and plants | bicycles and cars

Which one would you pick, and why: {}? | Help me decide between these two: {}? => a train or a plane | tea or coffee |
summer or winter | a beach trip or a mountain hike | a book or a film | a pen or a pencil | a quick shower or a long
bath | a phone call or a letter | pasta or potatoes | a cat or a goldfish

How do you say {} in French? | Translate {} into Spanish for me. | What is the German word for {}? | How would an
Italian say {} to a neighbor? => good morning | thank you | bread | water | good night | house | goodbye | apple |
mother | happy birthday | window | milk | see you tomorrow | dog | school | beautiful | red wine | the book

Rewrite this sentence in the past tense: {} => I walk to the market. | We play tennis on Sundays. | The dog barks at
the mailman. | My sister sings in a choir. | They eat lunch in the garden. | He reads a book every week. | The river
flows to the sea. | She paints small wooden birds. | The bell rings twice.

Make this sentence more polite: {} => Give me the salt now. | Stop talking so loudly. | Send me the report. | Move your
car. | You are wrong about that. | I want a table by the window. | Open the window, it is hot. | Answer my question. |
Bring me another cup.

Say the same thing in fewer words: {} => Due to the fact that it rained, we stayed inside. | In my own opinion, I think
the soup is too cold. | At this point in time, the shop is not open. | He is a man who always arrives in a late manner.
| The box that is over there is mine and belongs to me. | She made a decision to leave the building. | The reason why I
called is because I am lost. | It is possible that it might perhaps snow tonight.

Fix the grammar in this sentence: {} => She don't like apples. | Him and me goes to school. | They was late for the
meeting. | I has two brother and one sister. | Yesterday we go to the cinema. | There is many birds in the tree. | I am
agree with you. | He can sings very good. | The childs is playing outside.

Turn this statement into a question: {} => The bus leaves at noon. | You have finished your homework. | The museum
opens early today. | Maria can drive a truck. | The children like the new teacher. | Tom found his keys. | It will snow
tomorrow. | The bank is near the church.

Rewrite this so that it sounds more cheerful: {} => The party was fine. | It is raining again. | I have to work this
weekend. | The cake is ready. | My garden is small. | The food was okay. | Monday is here. | The trip was long. | We
lost the match.

Suggest a name for {}. | I need a fun name for {}; any idea? | What would you call {}? => a sleepy orange kitten | a
robot that waters plants | a rock band of grandmothers | a brave little mouse | a blue sports car | a family sailing
boat | a puppy with big ears | a planet made of ice | a pet snail | a new shade of green | a goldfish | a dragon who is
afraid of fire | a mountain cabin | a talking parrot | a wise old owl | a soup with everything in it | a quiz team | a
tiny horse | a bridge made of glass | a grumpy hen

Write a short slogan for {}. | Tell me why people should visit {}. => a bakery by the sea | a shop that repairs
bicycles | a coffee truck | a chess club for kids | a local library | a sandwich restaurant | an ice cream shop | a
hotel for dogs | a toy store | a music school | a farmers market | a science museum | a flower shop | a small cinema |
a public swimming pool | a nature park

Come up with a catchy title for {}. | What could be the first line of {}? => a podcast about space | a story about a
lost key | a movie about two rival cooks | a poem about autumn leaves | a weekly gardening newsletter | an article on
better sleep | a song about the rain | a book on the history of salt | a painting of a stormy sea | a novel set on a
train | a tale about a magic mirror | a letter to the future

Complete this sentence: {} ... | Finish the following thought in your own words: {} ... | How would you continue the
line "{} ..."? => The best part of the morning is | When the lights went out, everybody | My grandmother always told me
that | If I could fly, I would | The old house on the hill was | A good neighbor is someone who | On a rainy day I like
to | The secret of a good soup is | After the long hike, we finally | The cat jumped onto the table and | Learning a
new language is hard because | The train was late, so we | In the middle of the forest stood | Nothing smells better
than | When I feel nervous, I | The first snow of winter makes | Behind the blue door there was | A library is a place
where | The team won because | To stay healthy, people should | The sailor looked at the stars and | My favorite room
at home is | Before going to bed, the children | The teacher smiled when | If the shop is closed, we can | The garden
looked beautiful after | Music helps people to | The baker woke up early to

Make up a short story line with {} in it. | Where might we meet {}, and what would happen next? => a clumsy wizard | a
stolen pie | a lazy lion | a magic pencil | a snowman | a lost balloon | two pirates | a singing frog | a polite ghost
| a runaway train | a giant pumpkin | an invisible cat | a shy robot | a golden egg

Write a thank-you note to {}. | Write a cheerful birthday wish for {}. | What gift would suit {}? | What is a kind
thing to say to {}? | Write a friendly greeting for {}. => my piano teacher | my uncle | a man who loves fishing | a
nervous student | the school bus driver | my little niece | a teenager who likes science | a tired mother | a helpful
coworker | our family doctor | someone who enjoys cooking | a child who lost a game | the neighbor who fed my fish | my
twin sister | a couple with a new home | a colleague who is retiring | a generous host | my football coach | my tea
loving aunt | a shy new classmate | my grandfather

Describe {} in one sentence. | Write a line of poetry about {}. | How does {} make people feel? => the full moon | a
warm blanket | a summer thunderstorm | an old wooden boat | live music | a desert at night | falling snow | a surprise
party | the first day of school | a lonely lighthouse | a basket of lemons | the wind in spring | a long holiday | a
castle in the fog | a sleeping child | a field of sunflowers | the color blue | a rainy Sunday | a cup of cocoa | a
lost glove

What sounds would I hear at {}? | What is there to see at {}? => a busy fish market | a crowded train station | a
country fair | a bakery at dawn | a swimming pool in July | a wooden workshop | a harbor in the evening | a football
stadium | a dairy farm | a street parade | an airport | a mountain stream

What is one benefit of {}? | Why do so many people enjoy {}? | Is {} a good idea for older people? => drinking water |
watching football | stretching | dancing | reading every day | camping | meditation | learning to paint | walking to
work | collecting stamps | lifting weights | swimming in the sea | planting trees | singing karaoke | cycling | eating
breakfast | deep breathing | gentle yoga | speaking two languages | solving crossword puzzles | a day without screens |
playing cards

Can you work out {} for me? | My homework asks for {}; what is the answer? | What number do I get from {}? => 7 plus 15
| 12 minus 5 | 3 times 4 | 20 plus 30 | 18 minus 9 | 6 times 7 | 11 plus 14 | 40 divided by 8 | half of 26 | 100 minus
35 | double 16 | 5 times 12 | a third of 21 | 81 divided by 9 | 2 plus 4 plus 6 | 33 plus 44 | ten percent of 90 | 10
squared

I have always wondered: is {}? | Settle a small debate for us: is {}? => a tomato a fruit or a vegetable | the sun a
star or a planet | a whale a fish or a mammal | gold a metal or a gas | a spider an insect or something else | Africa a
country or a continent | a peanut a nut or a bean | Pluto bigger or smaller than Earth | honey made by bees or by wasps
| the piano a string instrument or a drum | glass made from sand or from wood | a penguin a bird or a mammal | rice a
grain or a root | bamboo a grass or a tree | water heavier or lighter than oil
"""

# Instructions that belong to no family, split at "|".
SINGLES = """
Who wrote the play Romeo and Juliet? | Why is the sky blue during the day? | How many legs does a spider have? | What
causes the tides in the ocean? | Who painted the Mona Lisa, and where is it now? | Which planet is the closest to the
Sun? | At what temperature does water begin to boil? | Why do leaves change color in the fall? | How many minutes are
there in two hours? | Which is the largest ocean on our planet? | What happens to ice when it gets warm? | How many
sides does a hexagon have? | Why do we see lightning before we hear thunder? | Which animal is known as the king of the
jungle? | What is the tallest mountain in the world? | Who was the first person to walk on the Moon? | Which gas do
plants take in from the air? | What do you call a baby sheep? | How do birds find their way when they travel south? |
Why does bread rise when it is in the oven? | What is the chemical formula of table salt? | How many letters are in the
English alphabet? | Which organ pumps blood through the human body? | What are the three states of matter? | Why do
onions make people cry? | Which instrument has eighty-eight black and white keys? | How many players are on a soccer
team? | What is the hardest natural material on Earth? | Why do cats purr when somebody pets them? | Which direction
does the sun rise from? | Who discovered penicillin, and why did it matter? | What do caterpillars turn into when they
grow up? | Which day comes right after Wednesday? | How many continents are there, and which one is the biggest? | What
is the freezing point of water in Celsius? | Why should people wear a helmet when they ride a bike? | Which color do
you get by mixing blue and yellow? | What does a red traffic light tell drivers to do? | How long does it take the
Earth to turn around once? | Why do some people sneeze in bright sunlight? | What do the letters DNA stand for? | Which
bird is a common symbol of peace? | How do fish breathe under the water? | Why is it important to brush your teeth
twice a day? | Who is the author of the novel Pride and Prejudice? | What is the name of the fairy tale with a glass
slipper? | How can I remove a coffee stain from a white shirt? | What should I cook tonight with eggs, spinach and
rice? | My phone battery dies quickly; how can I make it last longer? | Plan a simple afternoon for a family with two
small kids. | Tell me a short joke about a computer. | Write a riddle whose answer is a shadow. | Give me a positive
thought to begin the day with. | What question could I ask to get to know a stranger? | Sort these numbers from small
to large: 9, 2, 7, 4. | Put these words in alphabetical order: pear, lemon, apple. | Which word does not belong here:
rose, tulip, hammer, daisy? | Count the words in this line: the quick brown fox sleeps. | A farmer has ten hens and
sells four; how many are left? | Lisa bought three pens for two dollars each, so how much did she pay? | A movie starts
at seven and lasts two hours; when does it end? | What is the plural form of the word mouse? | Give the past tense of
the verb to swim. | Is the sentence "I saw her yesterday" written in the past or present? | Which adjective fits best:
the soup was very hot or very loud? | Summarize in a few words: the shop closed because nobody bought its shoes. | What
is the mood of this line: nobody came to my party? | Does this review sound happy or unhappy: the room was dirty and
cold? | Which season is the best time to plant tulip bulbs? | How do I know when a melon is ripe? | What can I use
instead of eggs in a cake? | How do I keep my glasses from fogging up? | What is a safe way to thaw frozen meat? | Why
does my sourdough starter smell like vinegar? | What should I wear to an outdoor wedding in June? | How can I get rid
of fruit flies in my kitchen? | What is a polite way to decline an invitation? | How do I apologize after I forgot a
meeting? | What is a good excuse to take a long walk? | How can I thank a stranger who returned my wallet? | What makes
a good leader in a small company? | Why do we shake hands when we meet people? | What is the purpose of a national
flag? | Why did ancient people build the pyramids in Egypt? | How did sailors navigate before modern maps were made? |
What was the Silk Road mainly used for? | Who invented the telephone, and what was it for? | What does the proverb
"actions speak louder than words" teach us? | Explain the saying "don't put all your eggs in one basket". | What do
people mean by "a piece of cake"? | How do I spell the number 40 in words? | What is the square root of sixty-four? |
How many centimeters are there in one meter? | Which is heavier, a kilogram of feathers or a kilogram of iron? | What
time is it in the afternoon when the clock shows 15:30? | How do vaccines help the body fight a disease? | What does
the heart do when we exercise? | Why do humans need to sleep every night? | Which vitamin do we get from sunlight on
our skin? | What is the job of the roots of a plant? | Why does the Moon seem to change its shape? | What makes a
rainbow appear after the rain? | How are mountains formed over a very long time? | Why is ocean water salty while river
water is not? | What is inside the core of the Earth? | What is a black hole, explained for a ten-year-old? | How does
a seed become a tall tree? | What keeps an airplane up in the air? | Why do magnets stick to some metals only? | How
does soap remove grease from dirty dishes? | What is the fastest land animal alive today? | Which mammal is able to fly
like a bird? | How do ants carry things heavier than themselves? | What is the longest river in South America? | Which
country gave the Statue of Liberty to America? | What is the currency that people use in Japan? | In which sport can
you score a home run? | Which piece moves diagonally on a chess board? | What do you need to make a paper airplane? | I
keep waking up at night; what might help me?
"""


def words(text: str) -> frozenset[str]:
    """Return the set of lower-case words of `text`."""
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """Return the overlap of two word sets, from 0 (none) to 1 (the same words)."""
    return len(a & b) / len(a | b)


def pieces(text: str) -> list[str]:
    """Return the parts of `text` between the bars, white space normalized."""
    return [" ".join(piece.split()) for piece in text.split("|")]


def make_prompts() -> list[str]:
    """Return the distinct instructions of 6 to 25 words that hold no reserved word, near duplicates left out."""
    candidates = pieces(SINGLES)
    # Later rounds put each item in another phrasing: spares for prompts that got no good answer.
    for turn in range(3):
        for family in FAMILIES.split("\n\n"):
            phrasings, items = map(pieces, family.split("=>"))
            candidates += [phrasings[(i + turn) % len(phrasings)].format(item) for i, item in enumerate(items)]
    prompts: list[str] = []
    for prompt in candidates:
        reserved = any(word in prompt.lower() for word in RESERVED)
        if 6 <= len(prompt.split()) <= 25 and not reserved:
            if all(jaccard(words(prompt), words(other)) <= 0.8 for other in prompts):
                prompts.append(prompt)
    return prompts


def generate(model, tokenizer, prompts: list[str]) -> list[str]:
    """Return the greedy continuation, at most 28 new tokens, of each prompt under the chat template."""
    chats = [[{"role": "user", "content": prompt + HINT}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(**batch, max_new_tokens=28, do_sample=False)
    return tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def first_sentence(output: str) -> str | None:
    """Return the first sentence of `output`, or None if the output stops before the sentence does."""
    line = output.strip().split("\n")[0]
    end = SENTENCE.search(line)
    return line[: end.end()].strip() if end else None


def is_good(prompt: str, response: str) -> bool:
    """Tell whether `response` is a sentence of its own: no refusal, no echo of the prompt, no repetition."""
    tokens = re.findall(r"[\w']+", response.lower())
    trigrams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return (
        len(tokens) >= 2
        and response.isascii()
        and response.count('"') % 2 == 0
        and not REFUSAL.search(response)
        and not any(word in response.lower() for word in RESERVED)
        and response.rstrip(".!?\"'") not in prompt
        and len(set(trigrams)) == len(trigrams)
        and len(set(tokens)) >= 0.6 * len(tokens)
    )


def split(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Split the rows in random order so that no test prompt has a word overlap above 0.5 with a train prompt."""
    sets = [words(row["prompt"]) for row in rows]
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    test: list[int] = []
    seen: set[int] = set()
    for start in order:
        # Prompts linked by an overlap above 0.5 stay together: this walks the whole group of `start`.
        group, todo = [], [start]
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                group.append(i)
                todo += [j for j in order if j not in seen and jaccard(sets[i], sets[j]) > 0.5]
        if len(test) + len(group) <= TEST:
            test += group
    train = [i for i in order if i not in set(test)][:TRAIN]
    return [rows[i] for i in train], [rows[i] for i in test]


def main() -> None:
    """Write train.jsonl and test.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output_dir", type=Path, default=Path("recipes/data/quickstart"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    rows: list[dict[str, str]] = []
    responses: set[str] = set()
    prompts = make_prompts()
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        for prompt, output in zip(batch, generate(model, tokenizer, batch), strict=True):
            response = first_sentence(output)
            short = response and len(tokenizer(response)["input_ids"]) <= MAX_TOKENS
            if short and is_good(prompt, response) and response not in responses:
                responses.add(response)
                rows.append({"prompt": prompt, "response": response})
        print(f"{start + len(batch)}/{len(prompts)} answered, {len(rows)} of them well", flush=True)
        if len(rows) >= TRAIN + TEST:
            break
    train, test = split(rows[: TRAIN + TEST])
    if (len(train), len(test)) != (TRAIN, TEST):
        raise ValueError(f"got {len(train)} train and {len(test)} test rows, want {TRAIN} and {TEST}: add prompts")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        lines = [json.dumps(row) + "\n" for row in part]
        (args.output_dir / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
