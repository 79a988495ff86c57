"""The parts of an engine's KV connector, none of which knows an engine.

vsprefill.vllm_connector puts them together for vLLM; docs/writing_a_connector.md says how to do so for another
engine. endpoints chooses a server, loads fetches caches in threads, paged writes them into paged memory.
"""

import logging

# A child of vLLM's logger, so that its handlers and format apply there; elsewhere an ordinary logger.
logger = logging.getLogger("vllm.vsprefill")
