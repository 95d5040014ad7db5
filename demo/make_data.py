"""Write the demo's questions: SQuAD v1.1 files about people, towns and matches that never were.

    python3 demo/make_data.py                      # demo/dev.json, the shipped part, and build/demo/train.json

Every passage is made from the templates below. A passage tells facts about one to four subjects (one in thirty: about
many, longer than BERT's window), so that neither the kind of an answer nor its place gives it away. The two parts share
templates but no passage, and the names in demo/dev.json are built from syllables and first names that the train part
never uses: a model cannot know the answers by heart. The same seed gives the same files.
"""

import argparse
import json
import os
import random
import re

SEED = 1
DEV_PASSAGES = 85
TRAIN_PASSAGES = 38_000
QUESTIONS_PER_PASSAGE = (3, 5)
LONG = 0.03  # share of passages longer than one window
FILLER = 0.15  # chance of a sentence without a fact behind a sentence with one


def words(text):
    return text.split()


MONTHS = words("January February March April May June July August September October November December")

# ---------------------------------------------------------------------------------------------------------------------
# Names. A part ("train" or "dev") has its own syllables and first names; endings and common nouns are shared.

SYLLABLES = [onset + vowel for onset in
             words("B Br C Ch D Dr F Fl G Gr H J K Kr L Ł M N P Pr Qu R S Sch Sk St Š T Th Tr V W Z Ž")
             for vowel in words("a al an ar e el en er é i il in ir o ol or ö u ul un ü ä á")]
random.Random(0).shuffle(SYLLABLES)
FIRST_NAMES = words(
    "Ana Élise Jürgen Tomás Mary John Ingrid Pavel Zoë Olga Henrik Łucja Fatima Noël Clara Samuel Björn Renée Akira "
    "Leila Márta Conor Agnes Peter Søren Yusuf Beatriz Hugo Irina Walter Chloé Ivan Edith Kofi Lucía Stefan Amara "
    "George Maja Félix Ruth Andrés Helena Oskar Priya Arthur Inés Viktor Greta Daniel Aïcha Martin Eva Niels Rosa "
    "Emil Sofía Thomas Hanna Jakub Laura Matteo Ida Göran Alice Rafael Nora Émile Vera Luis Astrid Karl Miriam Paolo "
    "Lena Victor Dora Anton Elsa Bruno Teresa Erik Carmen Otto Judith Marek Sara Léon Paula Simon")
FIRST_NAME_ENDINGS = words("a an ek en ia ie ik in is o on us")
SURNAME_ENDINGS = words("ček dley feld ger gård hart hoff ková král lund man meyer mond nes nov ński quist rell rero "
                        "ries ro rović sen ski son ston tti tz vač veira wald wick wood yama zzi")
TOWN_ENDINGS = words("bach berg borough bridge burg by cester dorf fell field ford grad ham haven hof holm lin løv "
                     "mont mora mouth nice nov pool port stad stein sund ton vale vik ville wick zell")
NUMBER_WORDS = words("three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty")
RIVER_ENDINGS = words("na rn ra l ne va sel re ss wen der mar")
PLACE_NOUNS = words("Harbour Garden Winter Lantern Mirror Orchard Island Station River Window Mountain Candle Voyage")
ADJECTIVES = words("Salt Silent Golden Broken Northern Hidden Crimson Long Empty Second Glass Last Burning Little")


def own(part, names):
    """The names of the list `names` that belong to `part`: every fifth is kept for "dev"."""
    return [name for number, name in enumerate(names) if (number % 5 == 4) == (part == "dev")]


SYLLABLES_OF = {part: own(part, SYLLABLES) for part in ("train", "dev")}
FIRST_NAMES_OF = {part: own(part, FIRST_NAMES) for part in ("train", "dev")}

# A maker draws one value: its spellings, longest first. The first stands in the passage, the others lie inside it and
# are accepted as answers too.


def stem(rng, part):
    word = rng.choice(SYLLABLES_OF[part])
    return word + rng.choice(SYLLABLES_OF[part]).lower() if rng.random() < 0.3 else word


def surname(rng, part):
    return stem(rng, part) + rng.choice(SURNAME_ENDINGS)


def person(rng, part):
    last = surname(rng, part)
    if rng.random() < 0.08:
        last += "-" + surname(rng, part)
    first = rng.choice(FIRST_NAMES_OF[part])
    if rng.random() < 0.4:
        first = rng.choice(SYLLABLES_OF[part]) + rng.choice("bdklmnrstv") + rng.choice(FIRST_NAME_ENDINGS)
    name = f"{first} {last}"
    title = rng.choice(("Dr.", "Professor", "Sir", "Captain")) if rng.random() < 0.1 else None
    return [f"{title} {name}", name, last] if title else [name, last]


def town(rng, part):
    name = stem(rng, part) + rng.choice(TOWN_ENDINGS)
    roll = rng.random()
    return [f"{rng.choice(('Port', 'Saint', 'New', 'Upper'))} {name}" if roll < 0.08 else
            f"{name}-on-{stem(rng, part)}" if roll < 0.12 else name]


def river(rng, part):
    name = stem(rng, part) + rng.choice(RIVER_ENDINGS)
    return [f"the River {name}", f"River {name}", name] if rng.random() < 0.3 else [f"the {name}", name]


def company(rng, part):
    name = surname(rng, part)
    return rng.choice((lambda: [f"{name} & Sons"], lambda: [f"{name} {rng.choice(('Ltd.', 'Inc.', 'AG'))}", name],
                       lambda: [f"{name}-{surname(rng, part)}"], lambda: [f"{name} Brothers"]))()


def book(rng, part):
    title = rng.choice((lambda: f"The {rng.choice(ADJECTIVES)} {rng.choice(PLACE_NOUNS)}",
                        lambda: f"The {rng.choice(PLACE_NOUNS)} of {town(rng, part)[0]}",
                        lambda: f"{surname(rng, part)}'s {rng.choice(PLACE_NOUNS)}"))()
    return [f'"{title}"', title]


def museum(rng, part):
    name = rng.choice((surname, lambda rng, part: town(rng, part)[0]))(rng, part)
    return [f"the {name} {rng.choice(('Museum', 'Gallery', 'Collection'))}"]


def bridge(rng, part):
    return [f"the {rng.choice((stem, surname))(rng, part)} {rng.choice(('Bridge', 'Viaduct', 'Crossing'))}"]


def invention(rng, part):
    return [f"the {surname(rng, part)} {rng.choice(words('lamp pump engine clock loom compass press valve'))}"]


def team(rng, part):
    return [f"{town(rng, part)[0]} {rng.choice(words('United Rovers City Wanderers Athletic'))}"]


def ship(rng, part):
    return [f"the {rng.choice((stem, lambda *_: rng.choice(ADJECTIVES) + ' Star', surname))(rng, part)}"]


def expedition(rng, part):
    return [f"the {surname(rng, part)} expedition"]


def festival(rng, part):
    return [f"the {town(rng, part)[0]} {rng.choice(('Festival', 'Fair', 'Carnival'))}"]


def prize(rng, part):
    return [f"the {surname(rng, part)} {rng.choice(('Prize', 'Medal', 'Award'))}"]


def university(rng, part):
    name = town(rng, part)[0]
    return [f"the University of {name}", f"University of {name}"] if rng.random() < 0.6 else [f"{name} College"]


def year(rng, part):
    return [str(rng.randint(1780, 1995))]


def date(rng, part):
    day, month, when = rng.randint(1, 28), rng.choice(MONTHS), year(rng, part)[0]
    return [f"{day} {month} {when}" if rng.random() < 0.6 else f"{month} {day}, {when}", when]


def count(rng, part):
    return [f"{rng.randint(11, 999):,}" if rng.random() < 0.4 else f"{rng.randint(1000, 480_000):,}"]


def few(rng, part):
    return [rng.choice(NUMBER_WORDS) if rng.random() < 0.3 else str(rng.randint(3, 99))]


def money(rng, part):
    sign = rng.choice("$£€")
    return [f"{sign}{rng.randint(100, 9999):,}" if rng.random() < 0.5 else
            f"{sign}{rng.randint(11, 99) / 10} {rng.choice(('million', 'billion'))}"]


def fee(rng, part):
    return [f"{rng.choice('$£€')}{rng.randint(1, 60)}.{rng.choice(('25', '40', '50', '75', '99'))}"]


def percent(rng, part):
    number = rng.choice((str(rng.randint(2, 95)), f"{rng.randint(2, 95)}.{rng.randint(1, 9)}"))
    return [f"{number}%" if rng.random() < 0.6 else f"{number} percent", number]


def score(rng, part):
    low = rng.randint(0, 4)
    return [f"{low + rng.randint(1, 4)}-{low}"]


def unit(*names):
    """A maker of measures in one of the units `names`."""
    def measure(rng, part):
        number = f"{rng.randint(12, 4200):,}"
        return [f"{number} {rng.choice(names)}", number]
    return measure


def one_of(words):
    """A maker of one of the comma-separated `words`, common nouns that both parts share."""
    choices = [word.strip() for word in words.split(",")]
    return lambda rng, part: [rng.choice(choices)]


crafts = one_of("glass, wool, cheese, paper, silk, clocks, leather, cider, salt, honey, knives, hats, pottery, violins")
goods = one_of("bicycles, typewriters, steam boilers, electric motors, tractors, sewing machines, telescopes, radios, "
               "railway carriages, fishing nets, coffee mills, printing presses, elevators, pianos")
fields = one_of("chemistry, botany, law, medicine, geology, astronomy, music, mathematics, philosophy, engineering, "
                "physics, history, theology, architecture")
jobs = one_of("chemist, painter, botanist, composer, lawyer, poet, surgeon, historian, sculptor, geologist")
causes = one_of("a flood, a fire, an earthquake, a storm, a landslide, an explosion")
foods = one_of("plum cake, smoked eel, almond bread, onion soup, pickled herring, chestnut pie, goat cheese, lamb stew")
animals = one_of("a blind cave fish, a flightless goose, a white fox, a giant beetle, a singing frog, a dwarf seal")
uses = one_of("draining mines, weaving linen, finding north in fog, lighting theatres, sorting letters, grinding "
              "lenses, lifting grain, copying maps, cooling milk, pressing grapes")
styles = one_of("Gothic, Baroque, neoclassical, Romanesque, Art Nouveau, Renaissance, modernist")
matter = one_of("granite, steel, brick, limestone, oak, concrete, iron, sandstone")
month = one_of(",".join(MONTHS))
tongues = one_of("Portuguese, Swedish, Arabic, Hungarian, Japanese, Polish, Welsh, Turkish, Finnish, Greek, Dutch")

# ---------------------------------------------------------------------------------------------------------------------
# Domains. Each has a subject, {name}, other slots with their makers, an opening, and facts: ways to tell each fact, and
# questions by the slot that answers them. "born 1" asks for the shorter spelling: of a date the year, of a measure
# the number.

DOMAINS = {
    "person": {
        "slots": {"name": person, "job": jobs, "town": town, "born": date, "school": university, "field": fields,
                  "teacher": person, "prize": prize, "won": year, "spouse": person, "wed": year, "died": year,
                  "grave": town, "book": book, "wrote": year},
        "stand_ins": ("the {job}",),
        "opening": ("{name} was a {job}.", "{name} worked as a {job}.", "A {job} by profession, {name} is still read."),
        "opening_asks": {"job": ("What was the profession of {name}?", "What did {name} work as?")},
                                 "facts": [
            (("{name} was born in {town} on {born}.", "{name} was born on {born} in {town}.",
              "{name} (born {born}) came from {town}."),
             {"town": ("Where was {name} born?", "In which town was {name} born?",
                       "What was the birthplace of {name}?"),
              "born": ("When was {name} born?", "On what date was {name} born?", "What is the birth date of {name}?"),
              "born 1": ("In what year was {name} born?", "In which year was {name} born?"),
              "name": ("Who was born in {town}?", "Who was born on {born}?")}),
            (("{name} studied {field} at {school}.", "At {school}, {name} studied {field}."),
             {"field": ("What did {name} study?", "Which subject did {name} study at {school}?"),
              "school": ("Where did {name} study?", "Where did {name} study {field}?",
                         "At which school did {name} study?"),
              "name": ("Who studied at {school}?", "Who studied {field} at {school}?")}),
            (("{name} was taught by {teacher}.", "{teacher} was the teacher of {name}."),
             {"teacher": ("Who taught {name}?", "Who was the teacher of {name}?", "By whom was {name} taught?"),
              "name": ("Whom did {teacher} teach?", "Who was taught by {teacher}?")}),
            (("In {won}, {name} won {prize}.", "{name} received {prize} in {won}.", "{prize} went to {name} in {won}."),
             {"prize": ("What prize did {name} win?", "Which award did {name} receive in {won}?"),
              "won": ("When did {name} win {prize}?", "In what year did {name} receive {prize}?"),
              "name": ("Who won {prize}?", "Who received {prize} in {won}?")}),
            (("{name} married {spouse} in {wed}.", "In {wed}, {name} married {spouse}."),
             {"spouse": ("Whom did {name} marry?", "Who married {name}?", "To whom was {name} married?"),
              "wed": ("When did {name} marry?", "In which year did {name} marry {spouse}?")}),
            (("{name} died in {died} and was buried in {grave}.",
              "After {name} died in {died}, the grave was in {grave}."),
             {"died": ("When did {name} die?", "In what year did {name} die?", "What year was the death of {name}?"),
              "grave": ("Where was {name} buried?", "Where is the grave of {name}?")}),
            (("{name} wrote {book} in {wrote}.", "{book}, written in {wrote}, is the best known work of {name}."),
             {"book": ("What did {name} write?", "What did {name} write in {wrote}?", "Which work did {name} write?"),
              "wrote": ("When did {name} write {book}?", "In which year was {book} written?",
                        "When was {book} written?"),
              "name": ("Who wrote {book}?", "Who was the author of {book}?")}),
        ]},
    "town": {
        "slots": {"name": town, "river": river, "founder": person, "founded": year, "people": count,
                  "mayor": person, "craft": crafts, "height": unit("metres", "feet"), "twin": town, "style": styles,
                  "church": year, "share": percent, "rail": year},
        "stand_ins": ("the town", "this place"),
        "opening": ("{name} is a town on {river}.", "{name} lies on the banks of {river}.",
                    "On {river} stands {name}."),
        "opening_asks": {"river": ("On which river does {name} lie?", "What river is {name} on?",
                                   "Which river is at {name}?"),
                          "name": ("Which town lies on {river}?", "What town stands on {river}?")},
        "facts": [
            (("{name} was founded in {founded} by {founder}.", "{founder} founded {name} in {founded}."),
             {"founder": ("Who founded {name}?", "By whom was {name} founded?", "Who was the founder of {name}?"),
              "founded": ("When was {name} founded?", "In what year was {name} founded?"),
              "name": ("What did {founder} found?", "Which town was founded in {founded}?")}),
            (("{name} has a population of {people}.", "The population of {name} is {people}.",
              "Some {people} people live in {name}."),
             {"people": ("What is the population of {name}?", "How many people live in {name}?")}),
            (("The mayor of {name} is {mayor}.", "{mayor} is the mayor of {name}."),
             {"mayor": ("Who is the mayor of {name}?", "Who is mayor of {name}?"),
              "name": ("Of which town is {mayor} the mayor?", "Where is {mayor} mayor?")}),
            (("{name} is known for its {craft}.", "Visitors come to {name} for the {craft}."),
             {"craft": ("What is {name} known for?", "What do visitors come to {name} for?"),
              "name": ("Which town is known for its {craft}?",)}),
            (("{name} lies {height} above the sea.", "At {height} above the sea, {name} is windy."),
             {"height": ("How high above the sea is {name}?", "At what height does {name} lie?"),
              "name": ("Which place lies {height} above the sea?",)}),
            (("{name} is twinned with {twin}.", "The twin town of {name} is {twin}."),
             {"twin": ("With which town is {name} twinned?", "What is the twin town of {name}?")}),
            (("The {style} church of {name} dates from {church}.",
              "In {name}, the {style} church was built in {church}."),
             {"style": ("In what style is the church of {name}?", "What is the style of the church of {name}?"),
              "church": ("When was the church of {name} built?", "From what year does the church of {name} date?")}),
            (("About {share} of the land around {name} is forest.", "Forest covers {share} of the land around {name}."),
             {"share": ("How much of the land around {name} is forest?",
                        "What share of land is forest around {name}?")}),
            (("The railway reached {name} in {rail}.", "In {rail}, the railway came to {name}."),
             {"rail": ("When did the railway reach {name}?", "In what year did the railway come to {name}?")}),
        ]},
    "invention": {
        "slots": {"name": invention, "maker": person, "made": year, "use": uses, "town": town, "price": money,
                  "patent": count, "sold": count, "backer": company, "show": date, "hall": town,
                  "weight": unit("kilograms", "pounds")},
        "stand_ins": ("it", "the device"),
        "opening": ("{name} is a device for {use}.", "{name} was made for {use}.", "For {use}, people used {name}."),
        "opening_asks": {"use": ("What was {name} for?", "What was {name} used for?"),
                                 "name": ("What was used for {use}?", "Which device was for {use}?")},
        "facts": [
            (("{maker} invented {name} in {made}.", "{name} was invented in {made} by {maker}."),
             {"maker": ("Who invented {name}?", "By whom was {name} invented?", "Who was the inventor of {name}?"),
              "made": ("When was {name} invented?", "In which year was {name} invented?"),
              "name": ("What did {maker} invent?", "What was invented by {maker}?")}),
            (("{name} was built in a workshop in {town}.", "In {town}, a workshop built {name}."),
             {"town": ("Where was {name} built?", "In which town was {name} built?")}),
            (("At first {name} cost {price}.", "The price of {name} was {price}."),
             {"price": ("How much did {name} cost?", "What was the price of {name}?",
                        "What did {name} cost at first?")}),
            (("Patent no. {patent} protected {name}.", "{name} was protected by patent no. {patent}."),
             {"patent": ("What patent number protected {name}?", "Which patent protected {name}?")}),
            (("{backer} sold {sold} of them.", "In all, {sold} were sold by {backer}."),
             {"backer": ("Who sold {sold} of them?", "Which company sold {sold} of them?"),
              "sold": ("How many were sold by {backer}?", "How many did {backer} sell?")}),
            (("{name} was first shown in {hall} on {show}.", "On {show}, {name} was first shown in {hall}."),
             {"show": ("When was {name} first shown?", "On what date was {name} first shown?"),
              "show 1": ("In what year was {name} first shown?",),
              "hall": ("Where was {name} first shown?", "In which town was {name} first shown?")}),
            (("{name} weighed {weight}.", "The weight of {name} was {weight}."),
             {"weight": ("How much did {name} weigh?", "What was the weight of {name}?", "How heavy was {name}?")}),
        ]},
    "match": {
        "slots": {"name": team, "loser": team, "score": score, "venue": town, "when": date, "crowd": count,
                  "scorer": person, "minute": few, "referee": person, "coach": person, "keeper": person,
                  "ticket": fee},
        "stand_ins": ("the winners",),
        "opening": ("{name} beat {loser} {score} in the final.", "In the final, {name} defeated {loser} by {score}."),
        "opening_asks": {"name": ("Who beat {loser}?", "Which team won the final against {loser}?",
                                  "Who defeated {loser}?"),
                          "loser": ("Whom did {name} beat?", "Which team lost the final to {name}?",
                                    "Who lost to {name}?"),
                          "score": ("What was the score of the final between {name} and {loser}?",
                                 "By what score did {name} beat {loser}?")},
        "facts": [
            (("{name} played the final in {venue} on {when}.", "On {when}, {name} played the final in {venue}."),
             {"venue": ("Where did {name} play the final?", "In which town did {name} play the final?"),
              "when": ("When did {name} play the final?", "On what date did {name} play the final?")}),
            (("A crowd of {crowd} saw {name}.", "{name} played before a crowd of {crowd}."),
             {"crowd": ("How many people saw {name}?", "How large was the crowd that saw {name}?")}),
            (("{scorer} scored for {name} in minute {minute}.", "In minute {minute}, {scorer} scored for {name}."),
             {"scorer": ("Who scored for {name}?", "Who scored in minute {minute}?"),
              "minute": ("In which minute did {scorer} score?", "When did {scorer} score for {name}?")}),
            (("The referee for {name} was {referee}.", "{referee} was the referee for {name}."),
             {"referee": ("Who was the referee for {name}?", "Which referee was there for {name}?")}),
            (("The coach of {name} was {coach}.", "{coach} coached {name}."),
             {"coach": ("Who coached {name}?", "Who was the coach of {name}?"),
              "name": ("Which team did {coach} coach?", "Whom did {coach} coach?")}),
            (("{keeper} kept goal for {name}.", "The goalkeeper of {name} was {keeper}."),
             {"keeper": ("Who kept goal for {name}?", "Who was the goalkeeper of {name}?")}),
            (("Tickets to see {name} cost {ticket}.", "A ticket to see {name} was {ticket}."),
             {"ticket": ("How much did tickets to see {name} cost?", "What was the price of a ticket to see {name}?")}),
        ]},
    "expedition": {
        "slots": {"name": expedition, "leader": person, "ship": ship, "sponsor": company, "port": town,
                  "left": date, "crew": few, "goal": town, "days": few, "animal": animals, "lost": few,
                  "cost": money, "doctor": person},
        "stand_ins": ("the expedition",),
        "opening": ("{name} sailed on {ship}.", "{ship} carried {name}.", "Aboard {ship} was {name}."),
        "opening_asks": {"ship": ("On which ship did {name} sail?", "What ship carried {name}?"),
                                  "name": ("Which expedition sailed on {ship}?", "What was aboard {ship}?")},
        "facts": [
            (("{leader} led {name}.", "{name} was led by {leader}.", "The leader of {name} was {leader}."),
             {"leader": ("Who led {name}?", "By whom was {name} led?", "Who was the leader of {name}?"),
              "name": ("What did {leader} lead?", "Which expedition was led by {leader}?")}),
            (("{name} left {port} on {left}.", "On {left}, {name} left the port of {port}."),
             {"port": ("Which port did {name} leave?", "From where did {name} leave?"),
              "left": ("When did {name} leave?", "On what date did {name} leave {port}?"),
              "left 1": ("In what year did {name} leave?",)}),
            (("{sponsor} paid {cost} for {name}.", "{name} was paid for by {sponsor} and cost {cost}."),
             {"sponsor": ("Who paid for {name}?", "Which company paid for {name}?"),
              "cost": ("How much did {sponsor} pay for {name}?", "What did {name} cost?")}),
            (("{name} had {crew} members.", "There were {crew} members in {name}."),
             {"crew": ("How many members did {name} have?", "How many members were in {name}?")}),
            (("{name} reached {goal} after {days} days.", "After {days} days, {name} reached {goal}."),
             {"goal": ("What place did {name} reach?", "Where was {name} after {days} days?"),
              "days": ("After how many days did {name} reach {goal}?", "How many days did {name} need?")}),
            (("{name} discovered {animal}.", "{animal} was discovered by {name}."),
             {"animal": ("What did {name} discover?", "Which animal was discovered by {name}?"),
              "name": ("Who discovered {animal}?", "Which expedition discovered {animal}?")}),
            (("{doctor} was the doctor of {name}.", "The doctor of {name} was {doctor}."),
             {"doctor": ("Who was the doctor of {name}?", "Who was doctor in {name}?")}),
        ]},
    "company": {
        "slots": {"name": company, "founder": person, "founded": year, "seat": town, "goods": goods, "sales": money,
                  "staff": count, "buyer": company, "bought": year, "share": percent, "chief": person,
                  "first": count},
        "stand_ins": ("the company", "the firm"),
        "opening": ("{name} made {goods}.", "{name} was a maker of {goods}.", "The firm of {name} sold {goods}."),
        "opening_asks": {"goods": ("What did {name} make?", "What did {name} sell?", "What was made by {name}?"),
                                   "name": ("Which company made {goods}?", "Who sold {goods}?")},
        "facts": [
            (("{founder} founded {name} in {founded}.", "{name} was founded by {founder} in {founded}."),
             {"founder": ("Who founded {name}?", "Who was the founder of {name}?", "By whom was {name} founded?"),
              "founded": ("When was {name} founded?", "In which year was {name} founded?"),
              "name": ("What did {founder} found?", "Which company was founded by {founder}?")}),
            (("{name} had its headquarters in {seat}.", "The headquarters of {name} stood in {seat}."),
             {"seat": ("Where did {name} have its headquarters?", "In which town were the headquarters of {name}?"),
              "name": ("Which company had its headquarters in {seat}?", "Whose headquarters were in {seat}?")}),
            (("Sales of {name} reached {sales}.", "{name} had sales of {sales}."),
             {"sales": ("What sales did {name} reach?", "How large were the sales of {name}?")}),
            (("{name} employed {staff} people.", "There were {staff} people employed by {name}."),
             {"staff": ("How many people did {name} employ?", "How many people were employed by {name}?")}),
            (("{buyer} bought {name} in {bought}.", "In {bought}, {name} was bought by {buyer}."),
             {"buyer": ("Who bought {name}?", "By which company was {name} bought?"),
              "bought": ("When was {name} bought?", "In what year did {buyer} buy {name}?"),
              "name": ("What did {buyer} buy?", "Which company was bought by {buyer}?")}),
            (("{name} held {share} of the market.", "A market share of {share} belonged to {name}."),
             {"share": ("What share of the market did {name} hold?", "How much of the market belonged to {name}?")}),
            (("{chief} was the director of {name}.", "The director of {name} was {chief}."),
             {"chief": ("Who was the director of {name}?", "Who directed {name}?")}),
        ]},
    "book": {
        "slots": {"name": book, "author": person, "out": year, "house": company, "hero": person, "place": town,
                  "prize": prize, "copies": count, "tongue": tongues, "translator": person, "pages": few,
                  "film": year, "director": person},
        "stand_ins": ("the book", "the novel"),
        "opening": ("{name} is a novel by {author}.", "{author} is the author of {name}.",
                    "The novel {name} is by {author}."),
        "opening_asks": {"author": ("Who wrote {name}?", "Who is the author of {name}?",
                                    "By whom is the novel {name}?"),
                          "name": ("What did {author} write?", "Which novel is by {author}?")},
        "facts": [
            (("{name} was published by {house} in {out}.", "{house} published {name} in {out}."),
             {"house": ("Who published {name}?", "By whom was {name} published?", "Which company published {name}?"),
              "out": ("When was {name} published?", "In what year was {name} published?"),
              "name": ("What did {house} publish?", "What was published by {house}?")}),
            (("The hero of {name} is {hero}.", "{hero} is the hero of {name}."),
             {"hero": ("Who is the hero of {name}?", "Which hero is in {name}?"),
              "name": ("Of what is {hero} the hero?",)}),
            (("{name} is set in {place}.", "The story of {name} is set in {place}."),
             {"place": ("Where is {name} set?", "In which town is {name} set?"),
              "name": ("What is set in {place}?", "Which story is set in {place}?")}),
            (("{name} won {prize}.", "{prize} was won by {name}."),
             {"prize": ("What prize did {name} win?", "What was won by {name}?"),
              "name": ("What won {prize}?", "Which novel won {prize}?")}),
            (("{name} sold {copies} copies.", "Some {copies} copies of {name} were sold."),
             {"copies": ("How many copies did {name} sell?", "How many copies of {name} were sold?")}),
            (("{translator} translated {name} into {tongue}.", "{name} was translated into {tongue} by {translator}."),
             {"translator": ("Who translated {name}?", "Who translated {name} into {tongue}?"),
              "tongue": ("Into which language was {name} translated?",
                         "Into what language did {translator} translate it?")}),
            (("{director} made a film of {name} in {film}.", "A film of {name} was made by {director} in {film}."),
             {"director": ("Who made a film of {name}?", "By whom was a film of {name} made?"),
              "film": ("When was a film of {name} made?", "In what year did {director} make a film?")}),
        ]},
    "museum": {
        "slots": {"name": museum, "city": town, "architect": person, "opened": date, "objects": count, "fee": fee,
                  "guests": count, "picture": book, "painter": person, "head": person, "style": styles,
                  "gift": person, "paintings": few},
        "stand_ins": ("it", "the building"),
        "opening": ("{name} stands in {city}.", "In {city} stands {name}.", "{name} is in the old centre of {city}."),
        "opening_asks": {"city": ("Where does {name} stand?", "In which town is {name}?", "Where is {name}?"),
                                  "name": ("What stands in {city}?",)},
        "facts": [
            (("{architect} designed {name} in the {style} style.",
              "{name} was designed by {architect} in {style} style."),
             {"architect": ("Who designed {name}?", "By whom was {name} designed?", "Who was the architect of {name}?"),
              "style": ("In what style was {name} designed?", "What is the style of {name}?"),
              "name": ("What did {architect} design?", "What was designed by {architect}?")}),
            (("{name} opened on {opened}.", "On {opened}, {name} was opened."),
             {"opened": ("When did {name} open?", "On what date was {name} opened?"),
              "opened 1": ("In what year did {name} open?", "In which year was {name} opened?")}),
            (("{name} holds {objects} objects.", "There are {objects} objects in {name}."),
             {"objects": ("How many objects does {name} hold?", "How many objects are in {name}?")}),
            (("A ticket for {name} costs {fee}.", "{name} asks {fee} for a ticket."),
             {"fee": ("How much does a ticket for {name} cost?", "What does {name} ask for a ticket?")}),
            (("{name} has {guests} visitors a year.", "Each year {guests} visitors come to {name}."),
             {"guests": ("How many visitors does {name} have a year?", "How many visitors come to {name}?")}),
            (("{name} shows {picture} by {painter}.", "{picture}, painted by {painter}, hangs in {name}."),
             {"painter": ("Who painted {picture}?", "By whom is {picture}?", "Which painter's work hangs in {name}?"),
              "picture": ("What did {painter} paint?", "Which picture hangs in {name}?",
                          "Which picture does {name} show?")}),
            (("The director of {name} is {head}.", "{head} is the director of {name}."),
             {"head": ("Who is the director of {name}?", "Who directs {name}?")}),
            (("{gift} gave {paintings} paintings to {name}.", "{name} owes {paintings} paintings to {gift}."),
             {"gift": ("Who gave paintings to {name}?", "To whom does {name} owe {paintings} paintings?"),
              "paintings": ("How many paintings did {gift} give?", "How many paintings does {name} owe to {gift}?")}),
        ]},
    "bridge": {
        "slots": {"name": bridge, "river": river, "town": town, "engineer": person, "built": year,
                  "length": unit("metres", "feet", "yards"), "cost": money, "cause": causes, "ruined": year,
                  "stuff": matter, "arches": few, "toll": fee, "cars": count},
        "stand_ins": ("it", "the structure"),
        "opening": ("{name} crosses {river} near {town}.", "Near {town}, {name} crosses {river}."),
        "opening_asks": {"river": ("Which river does {name} cross?", "What does {name} cross?"),
                                   "town": ("Near which town is {name}?", "Near what town does {name} cross {river}?"),
                          "name": ("What crosses {river}?", "Which bridge is near {town}?")},
        "facts": [
            (("{engineer} built {name} in {built}.", "{name} was built by {engineer} in {built}."),
             {"engineer": ("Who built {name}?", "By whom was {name} built?", "Which engineer built {name}?"),
              "built": ("When was {name} built?", "In which year was {name} built?"),
              "name": ("What did {engineer} build?", "What was built by {engineer}?")}),
            (("{name} is {length} long.", "The length of {name} is {length}."),
             {"length": ("How long is {name}?", "What is the length of {name}?"),
              "name": ("Which bridge is {length} long?",)}),
            (("{name} cost {cost}.", "Building {name} cost {cost}."),
             {"cost": ("How much did {name} cost?", "What did {name} cost?", "What was the cost of building {name}?")}),
            (("In {ruined}, {cause} damaged {name}.", "{name} was damaged by {cause} in {ruined}."),
             {"cause": ("What damaged {name}?", "By what was {name} damaged?"),
              "ruined": ("When was {name} damaged?", "In what year was {name} damaged by {cause}?")}),
            (("{name} is made of {stuff}.", "The builders made {name} of {stuff}."),
             {"stuff": ("What is {name} made of?", "Of what material is {name} made?"),
              "name": ("Which bridge is made of {stuff}?",)}),
            (("{name} has {arches} arches.", "There are {arches} arches in {name}."),
             {"arches": ("How many arches does {name} have?", "How many arches are there in {name}?")}),
            (("The toll for {name} is {toll}.", "Drivers pay a toll of {toll} for {name}."),
             {"toll": ("How much is the toll for {name}?", "What toll do drivers pay for {name}?")}),
            (("Each day {cars} cars use {name}.", "{name} carries {cars} cars a day."),
             {"cars": ("How many cars use {name} each day?", "How many cars does {name} carry?")}),
        ]},
    "festival": {
        "slots": {"name": festival, "month": month, "since": year, "guests": count, "host": person, "dish": foods,
                  "prize": fee, "winner": person, "sponsor": company, "nights": few, "singer": person,
                  "share": percent},
        "stand_ins": ("the event", "this event"),
        "opening": ("{name} is held every {month}.", "Every {month}, crowds come to {name}."),
        "opening_asks": {"month": ("In which month is {name} held?", "When is {name} held?"),
                                   "name": ("What is held every {month}?", "Which festival is held in {month}?")},
        "facts": [
            (("{host} started {name} in {since}.", "{name} was started by {host} in {since}."),
             {"host": ("Who started {name}?", "By whom was {name} started?"),
              "since": ("When did {name} start?", "In what year was {name} started?"),
              "name": ("What did {host} start?", "What was started by {host}?")}),
            (("{name} draws {guests} guests.", "Some {guests} guests visit {name}."),
             {"guests": ("How many guests does {name} draw?", "How many guests visit {name}?")}),
            (("The favourite dish at {name} is {dish}.", "Guests of {name} eat {dish}."),
             {"dish": ("What do guests of {name} eat?", "What is the favourite dish at {name}?"),
              "name": ("Where do guests eat {dish}?",)}),
            (("{winner} won the {prize} prize of {name}.", "The prize of {name}, {prize}, went to {winner}."),
             {"winner": ("Who won the prize of {name}?", "To whom did the prize of {name} go?"),
              "prize": ("How much was the prize of {name}?", "What was the prize won by {winner}?")}),
            (("{sponsor} pays {share} of the costs of {name}.", "Of the costs of {name}, {sponsor} pays {share}."),
             {"sponsor": ("Who pays for {name}?", "Which company pays the costs of {name}?"),
              "share": ("How much of the costs of {name} does {sponsor} pay?", "What share does {sponsor} pay?")}),
            (("{name} lasts {nights} nights.", "For {nights} nights, {name} fills the streets."),
             {"nights": ("How many nights does {name} last?", "For how many nights does {name} fill the streets?")}),
            (("{singer} sang at {name}.", "The singer at {name} was {singer}."),
             {"singer": ("Who sang at {name}?", "Who was the singer at {name}?"),
              "name": ("Where did {singer} sing?", "At which festival did {singer} sing?")}),
        ]},
}

# Sentences that answer nothing, but hold names, years and numbers that could be answers.
FILLERS = {
    "slots": {"person": person, "town": town, "year": year, "count": count, "company": company, "fee": fee},
    "texts": ("Records from before {year} are lost.", "The story is still told in the schools of {town}.",
              "A letter of {person} mentions this.", "According to {person}, \"nobody expected it\".",
              "The archive (now in {town}) keeps {count} letters about it.", "Much of this was forgotten after {year}.",
              "A plaque paid for by {company} recalls it.", "Later writers such as {person} doubted this.",
              "A stamp of {year}, price {fee}, shows the scene.", "It wasn't always so.")}

# ---------------------------------------------------------------------------------------------------------------------
# Passages.

SLOT = re.compile(r"{(\w+)}")


def draw(rng, part, makers, used):
    """One value for each slot of `makers`, {slot: spellings}, none sharing a spelling with those `used` so far."""
    values = {}
    for slot, maker in makers.items():
        while used & set(value := maker(rng, part)):
            pass
        used.update(value)
        values[slot] = value
    return values


def fill(template, shown):
    """`template` with {slot: text} filled in: the sentence, and {slot: offset} of each slot's text."""
    text, offsets, end = "", {}, 0
    for match in SLOT.finditer(template):
        text += template[end:match.start()]
        offsets[match[1]] = len(text)
        text += shown[match[1]]
        end = match.end()
    text += template[end:]
    return text, offsets


def subject(rng, part, domain, facts, used, pronoun):
    """Sentences about one subject: its opening and `facts` facts, as [(sentence, questions), …] in text order.

    A question is (its text, [(offset in the sentence, length), …]), the answers that are accepted. With
    `pronoun`, some sentences say "the town" or the like instead of the name.
    """
    values = draw(rng, part, domain["slots"], used)
    spoken = {slot: value[0] for slot, value in values.items()}
    stand_in, _ = fill(rng.choice(domain["stand_ins"]), spoken)
    chosen = rng.sample(domain["facts"], min(facts, len(domain["facts"])))
    told = []
    for number, (texts, asks) in enumerate([(domain["opening"], domain["opening_asks"]), *chosen]):
        name = values["name"]
        named = not (number and pronoun and rng.random() < 0.4)
        if not named:
            name = [stand_in]
        elif number and name[0][0] != '"' and rng.random() < 0.5:  # a title keeps its quotation marks
            name = name[rng.randrange(len(name)):]
        sentence, offsets = fill(rng.choice(texts), {**spoken, "name": name[0]})
        sentence = sentence[0].upper() + sentence[1:]
        questions = []
        for key, phrasings in asks.items():
            slot, _, shorter = key.partition(" ")
            if slot not in offsets or (slot == "name" and not named):
                continue
            spellings = name if slot == "name" else values[slot]
            question, _ = fill(rng.choice(phrasings), {**spoken, "name": rng.choice(values["name"])})
            spans = [(offsets[slot] + spellings[0].index(spelling), len(spelling))
                     for spelling in spellings[1 if shorter else 0:]]
            questions.append((question, spans))
        told.append((sentence, questions))
    return told


def sentences(rng, part, subjects, facts):
    """The sentences of a passage about `subjects` subjects with `facts` (low, high) facts each; see `subject`."""
    used = set()
    kinds = rng.sample(2 * list(DOMAINS), subjects)
    if subjects < 5 and rng.random() < 0.7:
        kinds = subjects * kinds[:1]  # only the name in the question tells the subjects apart
    told = []
    for kind in kinds:
        for sentence in subject(rng, part, DOMAINS[kind], rng.randint(*facts), used, pronoun=subjects == 1):
            told.append(sentence)
            if rng.random() < FILLER:
                values = draw(rng, part, FILLERS["slots"], used)
                filler, _ = fill(rng.choice(FILLERS["texts"]), {slot: value[0] for slot, value in values.items()})
                told.append((filler, []))
    return told


def paragraph(rng, part, size, prefix):
    """One SQuAD paragraph. `size` is (subjects, (least facts, most facts)); question ids start with `prefix`."""
    told = sentences(rng, part, *size)
    context, asked = "", []
    for sentence, questions in told:
        for question, spans in questions:
            asked.append((question, [(len(context) + offset, length) for offset, length in spans]))
        context += sentence + " "
    context = context.rstrip()
    counts = {}
    for question, _ in asked:
        counts[question] = counts.get(question, 0) + 1
    asked = [(question, spans) for question, spans in asked if counts[question] == 1]
    asked = rng.sample(asked, min(len(asked), rng.randint(*QUESTIONS_PER_PASSAGE)))
    return {"context": context,
            "qas": [{"id": f"{prefix}-{number}", "question": question,
                     "answers": [{"text": context[start:start + length], "answer_start": start}
                                 for start, length in spans]}
                    for number, (question, spans) in enumerate(asked)]}


def size_of(rng, progress):
    """(subjects, facts) for a passage. The train part begins with easy ones; `progress` runs from 0 to 1."""
    if progress < 0.37:
        return rng.choice(((1, (1, 2)), (2, (0, 1)), (2, (0, 1))))
    if progress < 0.71:
        return rng.choice(((1, (1, 4)), (2, (1, 2)), (3, (0, 1))))
    if rng.random() < LONG:
        return rng.randint(7, 12), (3, 6)
    return rng.choice(((1, (1, 3)), (1, (4, 7)), (2, (2, 4)), (3, (1, 3)), (4, (1, 2))))


def make(part, passages, seed):
    """A SQuAD v1.1 document of `passages` passages; `part` is "train" (from easy to hard) or "dev"."""
    rng = random.Random(f"{part} {seed}")
    data = []
    for number in range(passages):
        size = size_of(rng, number / passages if part == "train" else 1)
        paragraphs = [paragraph(rng, part, size, f"{part}-{number + 1:05d}")]
        data.append({"title": f"Passage {number + 1}", "paragraphs": paragraphs})
    return {"version": "1.1", "data": data}


def write(path, document):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, ensure_ascii=False, indent=None)
        file.write("\n")
    questions = sum(len(paragraph["qas"]) for article in document["data"] for paragraph in article["paragraphs"])
    print(f"{path}: {len(document['data'])} passages, {questions} questions, {os.path.getsize(path):,} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dev", default="demo/dev.json", help="written: the shipped, unseen questions")
    parser.add_argument("--train", default="build/demo/train.json", help="written: what demo/train.py learns from")
    args = parser.parse_args()
    write(args.dev, make("dev", DEV_PASSAGES, args.seed))
    write(args.train, make("train", TRAIN_PASSAGES, args.seed))


if __name__ == "__main__":
    main()
