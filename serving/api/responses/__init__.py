"""OpenAI's Responses API: items instead of messages, and answers that are kept."""
