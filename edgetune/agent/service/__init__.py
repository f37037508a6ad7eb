"""The agent as a good neighbour: when it yields to others, and how it tells the world what it is doing."""
