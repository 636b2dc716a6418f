//! What a template's text is changed into before it is compiled.

/// The filter that every assigned value goes through.
pub(super) const ASSIGNED: &str = "__assigned";
/// The filter of a value that is assigned to an attribute of a namespace.
pub(super) const ASSIGNED_TO_ATTRIBUTE: &str = "__assigned_to_attribute";

/// The template with three kinds of statements changed, and everything else, whitespace control included, as it is:
///
/// - transformers' `{% generation %}` … `{% endgeneration %}`, which only marks the answers for training masks, becomes a
///   block that always renders;
/// - `{% set a = b %}` becomes `{% set a = (b)|filter %}`, so that what a template keeps can be bounded: fuel counts
///   instructions, and a few of them can double a text a hundred times;
/// - behind `{% macro f(a) %}`, `{% call(a) f() %}` and `{% with a = b %}`, which give variables values, too, and behind the
///   end of `{% set a %}` … `{% endset %}` comes `{% set a = (a)|filter %}`.
pub(super) fn prepared(source: &str) -> String {
    let mut output = String::with_capacity(source.len() + source.len() / 8);
    let mut rest = source;
    // Variables of the blocks that are open, the innermost last.
    let mut captured: Vec<&str> = Vec::new();
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        output += before;
        let length = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map(|end| end + 2),
            Some(b'{') => inner_end(&tag[2..], "}}").map(|end| end + 4),
            Some(b'%') => inner_end(&tag[2..], "%}").map(|end| end + 4),
            _ => Some(1),
        };
        // What is not closed is the compiler's to refuse.
        let Some(length) = length else {
            return output + tag;
        };
        let (tag, after) = tag.split_at(length);
        let statement = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}"));
        match statement {
            Some(inner) if trimmed(inner) == "raw" => {
                let end = raw_end(after);
                output += tag;
                output += &after[..end];
                rest = &after[end..];
                continue;
            }
            Some(inner) => {
                captured.extend(captures(trimmed(inner)));
                let names = match trimmed(inner) {
                    "endset" => captured.pop().into_iter().collect(),
                    other => introduced(other),
                };
                output += &match names.is_empty() {
                    true => statement_for(inner),
                    false => followed_by_checks(inner, &names),
                };
            }
            None => output += tag,
        }
        rest = after;
    }
    output + rest
}

/// A statement without its whitespace and whitespace control.
fn trimmed(inner: &str) -> &str {
    inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+')
}

/// What stands for the statement `{%inner%}`.
fn statement_for(inner: &str) -> String {
    let statement = match trimmed(inner) {
        "generation" => "if true".to_owned(),
        "endgeneration" => "endif".to_owned(),
        other => match assignment(other) {
            Some((target, value)) => {
                let filter = if target.contains('.') {
                    ASSIGNED_TO_ATTRIBUTE
                } else {
                    ASSIGNED
                };
                format!("{target}= ({value})|{filter}")
            }
            None => return format!("{{%{inner}%}}"),
        },
    };
    let control = |present: bool| if present { "-" } else { "" };
    let keep = |sign: Option<char>| {
        if sign == Some('+') {
            "+"
        } else {
            control(sign == Some('-'))
        }
    };
    let (first, last) = (inner.chars().next(), inner.chars().next_back());
    format!("{{%{} {statement} {}%}}", keep(first), keep(last))
}

/// The statement, with the value of each of `names` assigned anew behind it. What the template wants of the whitespace
/// behind holds behind the last.
fn followed_by_checks(inner: &str, names: &[&str]) -> String {
    let control = inner.chars().next_back().filter(|last| matches!(last, '-' | '+'));
    let inner = control.map_or(inner, |_| &inner[..inner.len() - 1]);
    let checks: Vec<String> = names
        .iter()
        .map(|name| format!("{{% set {name} = ({name})|{ASSIGNED} "))
        .collect();
    let control = control.map(String::from).unwrap_or_default();
    format!("{{%{inner}%}}{}{control}%}}", checks.join("%}"))
}

/// The rest of a statement that begins with the word `keyword`.
fn after_keyword<'a>(statement: &'a str, keyword: &str) -> Option<&'a str> {
    let rest = statement.strip_prefix(keyword)?;
    rest.starts_with(|c: char| c.is_whitespace() || c == '(')
        .then(|| rest.trim_start())
}

/// `a` of a block `set a` or `set a | filter`.
fn captures(statement: &str) -> Option<&str> {
    let target = after_keyword(statement, "set")?;
    let name = leading_name(target)?;
    let behind = target[name.len()..].trim_start();
    (behind.is_empty() || behind.starts_with('|')).then_some(name)
}

/// The variables that a statement gives values to by other means than `set`.
fn introduced(statement: &str) -> Vec<&str> {
    if let Some(bindings) = after_keyword(statement, "with") {
        return names(bindings);
    }
    let parameters = match after_keyword(statement, "macro") {
        Some(signature) => leading_name(signature).map(|name| signature[name.len()..].trim_start()),
        None => after_keyword(statement, "call"),
    };
    let parameters = parameters.and_then(|parameters| parameters.strip_prefix('('));
    let inner = parameters.and_then(|inner| Some(&inner[..inner_end(inner, ")")?]));
    inner.map(names).unwrap_or_default()
}

/// The name that begins each part of a list with commas.
fn names(list: &str) -> Vec<&str> {
    let (mut found, mut rest) = (Vec::new(), list);
    loop {
        let end = inner_end(rest, ",").unwrap_or(rest.len());
        found.extend(leading_name(rest[..end].trim_start()));
        match rest.get(end + 1..) {
            Some(behind) => rest = behind,
            None => return found,
        }
    }
}

fn leading_name(text: &str) -> Option<&str> {
    let end = text
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(text.len());
    (end > 0 && !text.starts_with(|c: char| c.is_numeric())).then(|| &text[..end])
}

/// `set a` and `b` of `set a = b`.
fn assignment(statement: &str) -> Option<(&str, &str)> {
    let rest = statement.strip_prefix("set")?;
    if !rest.starts_with(|c: char| c.is_whitespace() || c == '(') {
        return None;
    }
    let equals = rest.find('=')?;
    // A block `{% set a | filter %}` has no value of its own; a comparison is none of its parts.
    let target = &rest[..equals];
    let is_target = target
        .chars()
        .all(|c| c.is_alphanumeric() || c.is_whitespace() || matches!(c, '_' | '.' | ',' | '(' | ')'));
    let (value_start, target_end) = (3 + equals + 1, 3 + equals);
    (is_target && !rest[equals + 1..].starts_with('=')).then(|| (&statement[..target_end], &statement[value_start..]))
}

/// Where the code before `end` ends, as the compiler sees it: not within a text, nor within brackets.
fn inner_end(code: &str, end: &str) -> Option<usize> {
    let bytes = code.as_bytes();
    let (mut index, mut depth) = (0usize, 0usize);
    while index < bytes.len() {
        if depth == 0 && bytes[index..].starts_with(end.as_bytes()) {
            return Some(index);
        }
        match bytes[index] {
            quote @ (b'"' | b'\'') => {
                index += 1;
                while *bytes.get(index)? != quote {
                    index += if bytes[index] == b'\\' { 2 } else { 1 };
                }
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        index += 1;
    }
    None
}

/// Where `{% endraw %}` begins; the end of the text without one.
fn raw_end(text: &str) -> usize {
    let mut from = 0;
    while let Some(start) = text[from..].find("{%").map(|start| from + start) {
        let Some(end) = text[start..].find("%}") else { break };
        if end >= 2 && trimmed(&text[start + 2..start + end]) == "endraw" {
            return start;
        }
        from = start + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_changed_and_nothing_else() {
        let cases = [
            ("{% generation %}b{%- endgeneration -%}", "{% if true %}b{%- endif -%}"),
            ("{%- set x = y -%}", "{%- set x = ( y)|__assigned -%}"),
            (
                "{%set ns.x=ns.y if a == 1 else 'b'+%}",
                "{% set ns.x= (ns.y if a == 1 else 'b')|__assigned_to_attribute +%}",
            ),
            ("{% set a, b = 1, 2 %}", "{% set a, b = ( 1, 2)|__assigned %}"),
            // Ends and beginnings within texts, brackets, comments, output and raw blocks.
            (
                r#"{% set x = "%}\"{% set y = 1 %}" %}"#,
                r#"{% set x = ( "%}\"{% set y = 1 %}")|__assigned %}"#,
            ),
            (
                "{{ {'a': {'b': 1}} }}{{ '{% set x = 1 %}' }}",
                "{{ {'a': {'b': 1}} }}{{ '{% set x = 1 %}' }}",
            ),
            ("{# {% set x = 1 %} #}", "{# {% set x = 1 %} #}"),
            (
                "{% raw %}{% set x = 1 %}{% endraw %}",
                "{% raw %}{% set x = 1 %}{% endraw %}",
            ),
            // Values that come by other ways.
            (
                "{%- macro f(a, b=[1, 2], c='x,y') -%} a",
                "{%- macro f(a, b=[1, 2], c='x,y') %}{% set a = (a)|__assigned %}{% set b = (b)|__assigned %}\
                 {% set c = (c)|__assigned -%} a",
            ),
            ("{% macro f() %}", "{% macro f() %}"),
            ("{% call(a) f(b) %}", "{% call(a) f(b) %}{% set a = (a)|__assigned %}"),
            ("{% call f(b) %}", "{% call f(b) %}"),
            (
                "{% with a = f(x, y), b = 2 +%}",
                "{% with a = f(x, y), b = 2 %}{% set a = (a)|__assigned %}{% set b = (b)|__assigned +%}",
            ),
            (
                "{% set x %}{% set y | upper %}text{% endset %}{% endset -%}",
                "{% set x %}{% set y | upper %}text{% endset %}{% set y = (y)|__assigned %}{% endset %}{% set x = (x)|__assigned -%}",
            ),
            // None of these assigns a value.
            (
                "{% set x = 1 %}{% endset %}",
                "{% set x = ( 1)|__assigned %}{% endset %}",
            ),
            (
                "{% macros(a) %}{% without = 1 %}{% with %}",
                "{% macros(a) %}{% without = 1 %}{% with %}",
            ),
            ("{% settle = 1 %}", "{% settle = 1 %}"),
            ("{% if a == b %}", "{% if a == b %}"),
            ("a { b", "a { b"),
            ("{% set x = 'open", "{% set x = 'open"),
        ];
        for (source, expected) in cases {
            assert_eq!(prepared(source), expected, "{source}");
        }
    }
}
