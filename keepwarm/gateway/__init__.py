"""From an authenticated request to a settled turn. Sees neutral requests and events, never JSON, never llama.cpp."""
