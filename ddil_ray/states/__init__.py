"""Which states are learnt on: the imitation-learning half of DDIL; pure torch."""
