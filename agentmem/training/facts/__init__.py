"""The parts of generated conversations: attributes, values, wordings, small talk, rules, tools."""
