"""What generated conversations are made of: attributes, values, wordings, small talk, rules, tools."""
