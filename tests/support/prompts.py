"""Forty prompts as people write them: questions, code, lists, several languages, a few words to a few hundred."""

from __future__ import annotations

_REPORT = """The harbour office of Lindmouth keeps a ledger of every vessel that enters the estuary. In the spring of
the year under review, one hundred and twelve vessels came in on the flood and ninety-seven left on the ebb. The gap
is explained by the new dry dock, which took in fifteen hulls for repair and had returned none of them by the end of
the quarter. Captain Arden, who signs the ledger, notes that the dredging of the northern channel has made the passage
safer for ships that draw more than five metres, but that the fog signal on the mole failed on eleven nights. He asks
for a second keeper, for oil, and for the repair of the stone stairs, which the winter storms have loosened. The
council granted the oil and the stairs and deferred the keeper to the autumn session. Trade in timber rose by a fifth,
trade in salt fell by a third, and the fish market, which had been declining for a decade, held steady for the first
time. The office recommends that the dues on timber be left alone and that those on salt be lowered, lest the salt
boats move to Carrow, where the quay is shorter but the dues are half of ours."""

_STORY = """Mara found the key on the third step of the tower, under a leaf that had no business being there in June. It
was small, black and cold, and it fitted none of the doors she knew. She tried the pantry, the clock, the chapel and
the box in which her grandmother kept letters. On the fourth evening she tried the well."""

_CODE = """def merge_intervals(intervals):
    \"\"\"Merge overlapping closed intervals.

    >>> merge_intervals([(1, 3), (2, 6), (8, 10)])
    [(1, 6), (8, 10)]
    \"\"\"
    merged = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
"""

PROMPTS = (
    "What is gravity?",
    "The capital of France is",
    "Once upon a time",
    "2 + 2 =",
    "Hello",
    "Explain photosynthesis to a ten-year-old in three sentences.",
    "List five uses for a paperclip:\n1.",
    "Translate into German: The weather is lovely today.",
    "Wer hat die Relativitätstheorie entwickelt, und in welchem Jahr?",
    "¿Cuál es la diferencia entre ser y estar?",
    "Quelle est la recette de la ratatouille ?",
    "日本で一番高い山は何ですか。",
    "请用一句话介绍长城。",
    "Что такое энтропия?",
    "ما هي عاصمة مصر؟",
    "Write a haiku about the sea.",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders WHERE",
    "#include <stdio.h>\n\nint main(void) {\n",
    "import numpy as np\n\ndef softmax(x):\n    ",
    _CODE,
    "<html>\n<head>\n<title>My garden</title>\n",
    '{"name": "Ada", "born": 1815, "known for": [',
    "Q: How many legs does a spider have?\nA: Eight.\nQ: How many legs does an ant have?\nA:",
    "Dear Sir or Madam,\n\nI am writing to complain about the",
    "The three laws of thermodynamics are as follows. First,",
    "Roses are red,\nViolets are blue,\n",
    "In 1969, Neil Armstrong",
    "A train leaves Leeds at 9:00 at 80 km/h, another leaves York at 9:30 at 100 km/h. The distance is 40 km. They",
    "Summarise in one line: " + _STORY,
    _STORY,
    _STORY + "\n\nThe well",
    "Report of the harbour office\n\n" + _REPORT,
    _REPORT + "\n\nIn short, the office",
    _REPORT + "\n\nThe council should",
    _REPORT + "\n\n" + _STORY + "\n\nWhat do the two texts have in common?",
    "😀 😃 😄 What do these emoji mean?",
    "a b c d e f g h i j k l m n o p",
    "    \t  indented\n\n\n    text   with   odd    spacing",
    "Ingredients: flour, eggs, milk, sugar, a pinch of salt.\n\nMethod: In a large bowl,",
)
