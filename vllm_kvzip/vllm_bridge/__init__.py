"""The only room that imports vLLM. vLLM loads :func:`plugin.register`; nothing else imports it."""
