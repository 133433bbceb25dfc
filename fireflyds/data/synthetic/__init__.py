"""The generated corpus of the demo: documents, dialogues and questions about an invented world."""
