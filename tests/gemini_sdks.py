"""Google's two SDKs, imported without the warnings they give about their own and Python's age."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import google.ai.generativelanguage as glm
    import google.generativeai as generativeai
    from google import genai
    from google.api_core import rest_streaming

__all__ = ["genai", "generativeai", "glm", "rest_streaming"]
