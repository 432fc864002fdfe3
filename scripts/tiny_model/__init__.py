"""How the model that ships with trainkit is made: its language, its training, and the data of the quickstart.

``words`` → ``events`` (who did what, where and when) → ``stories`` and ``chats`` (what the model is trained on) and
``cards`` (what the quickstart teaches it) → ``training``. The verbs are in ``command``, called by
``scripts/build_tiny_model``. Everything random comes from one seeded ``random.Random`` that is handed down.
"""
