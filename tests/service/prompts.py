"""Real questions of many kinds and lengths, for tests that compare answers."""

PROMPTS = [
    "What is the capital of France?",
    "How can I improve my time management skills?",
    "Explain in two sentences how a refrigerator keeps food cold.",
    "Write a haiku about the first snow of the year.",
    "What is 17 times 23? Show your work.",
    "Name three rivers in South America.",
    "Translate 'good morning' into Spanish, Italian and German.",
    "Why is the sky blue during the day and red at sunset?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Summarise the plot of Romeo and Juliet for a ten-year-old child.",
    "What are the main differences between a virus and a bacterium?",
    "Give me a short recipe for tomato soup.",
    "Rewrite this sentence politely: send me the report now.",
    "How do vaccines work?",
    "List the planets of the solar system from the largest to the smallest.",
    "I have 3 apples, give away 2 and buy 5 more. How many apples do I have?",
    "What should I pack for a three-day hike in the mountains in autumn?",
    "Explain what a hash table is, and when a tree would be the better choice.",
    "Write the opening line of a mystery novel set in a lighthouse.",
    "Who wrote the Origin of Species, and what is it about?",
    "Describe the taste of a lemon to somebody who has never eaten one.",
    "Which is heavier: a kilogram of feathers or a kilogram of iron? Explain.",
    "Give three arguments for and three against working from home.",
    (
        "Here are the minutes of our meeting. Anna reported that the new bridge over the canal will open in May, one "
        "month later than planned, because the steel for the railings came late. Ben asked whether the cyclists' lane "
        "could open earlier; Anna will find out by Friday. Carla showed the survey among the neighbours: most of them "
        "want trees along the northern bank and fewer parking places. The group agreed to ask the city for twelve lime "
        "trees. David reminded everybody that the budget for this year is nearly used up, and that the trees must "
        "therefore be planted in January at the earliest. The next meeting is on the second Tuesday of the month. "
        "Please write a summary of these minutes in one sentence, and then list who has to do what."
    ),
]
