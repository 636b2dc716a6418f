//! Rendered conversations as jinja2 gives them with transformers' settings.

use std::collections::BTreeMap;

use candle_models::{ChatMessage, ChatTemplate, Error};
use serde::Deserialize;

use crate::golden;

#[derive(Deserialize)]
struct Golden {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    messages: Vec<BTreeMap<String, String>>,
    rendered: Option<String>,
    error: Option<String>,
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

#[test]
fn renders_as_the_reference() {
    let golden: Golden = serde_json::from_slice(&std::fs::read(golden("text/chat_templates.json")).unwrap()).unwrap();
    for case in golden.cases {
        let template = ChatTemplate::new(&golden.templates[&case.template], Some("<s>"), Some("</s>")).unwrap();
        let messages: Vec<_> = case
            .messages
            .iter()
            .map(|m| message(&m["role"], &m["content"]))
            .collect();
        match (template.render(&messages), case.rendered, case.error) {
            (Ok(ours), Some(reference), _) => assert_eq!(ours, reference, "{}: {messages:?}", case.template),
            (Err(Error::InvalidArgument(ours)), _, Some(reference)) => {
                assert!(
                    ours.contains(&reference),
                    "{}: {ours} instead of {reference}",
                    case.template
                );
            }
            (ours, reference, error) => panic!("{}: {messages:?}: {ours:?}, {reference:?}, {error:?}", case.template),
        }
    }
}

#[test]
fn refusals_carry_the_templates_words() {
    let template = ChatTemplate::new("{{ raise_exception('only ' ~ messages|length) }}", None, None).unwrap();
    let error = template.render(&[message("user", "x")]).unwrap_err().to_string();
    assert!(error.ends_with("refuses the messages: only 1"), "{error}");
}

#[test]
fn endless_and_swelling_templates_are_stopped() {
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% set c = a %}{% endfor %}{% endfor %}";
    let error = ChatTemplate::new(endless, None, None)
        .unwrap()
        .render(&[message("user", "x")])
        .unwrap_err();
    assert!(error.to_string().contains("too long"), "{error}");
    let swelling = "{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}";
    let error = ChatTemplate::new(swelling, None, None)
        .unwrap()
        .render(&[message("user", "x")])
        .unwrap_err();
    assert!(error.to_string().contains("exceeds"), "{error}");
    let nested = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(
        ChatTemplate::new(nested, None, None)
            .unwrap()
            .render(&[message("user", "x")])
            .is_err()
    );
}

#[test]
fn what_a_template_keeps_is_bounded() {
    let cases = [
        (
            "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "too much",
        ),
        (
            "{% set ns = namespace(x='\"') %}{% for i in range(99) %}{% set ns.x = ns|tojson %}{% endfor %}",
            "too much",
        ),
        (
            "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = ns.l + ['x' * 60000000] %}{% endfor %}",
            "too much",
        ),
        (
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "a namespace into a namespace",
        ),
        (
            "{% set ns = namespace() %}{% set ns.x = [{'a': ns}] %}{{ ns|tojson }}",
            "a namespace into a namespace",
        ),
        (
            "{% set ns = namespace() %}{% set ns.x = [ns]|reverse %}{{ ns }}",
            "a namespace into a namespace",
        ),
        (
            "{% set ns = namespace() %}{% macro m() %}{{ ns }}{% endmacro %}{% set ns.m = m %}",
            "a macro",
        ),
        (
            "{% set ns = namespace() %}{% for i in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}",
            "too deeply",
        ),
        // What has values by other means than `set`.
        (
            "{% macro m(x, n=0) %}{% if n < 99 %}{{ m(x ~ x, n + 1) }}{% endif %}{% endmacro %}{{ m('xx') }}",
            "too much",
        ),
        (
            "{% macro m(x) %}{{ caller(x ~ x) }}{% endmacro %}\
             {% macro r(x, n) %}{% if n < 99 %}{% call(y) m(x) %}{{ r(y, n + 1) }}{% endcall %}{% endif %}{% endmacro %}\
             {{ r('xx', 0) }}",
            "too much",
        ),
    ];
    let withs = format!(
        "{{% set x = 'xx' %}}{}",
        "{% with x = x ~ x %}".repeat(40) + &"{% endwith %}".repeat(40)
    );
    let blocks = format!(
        "{{% set x = 'xx' %}}{}",
        "{% set x %}{{ x }}{{ x }}{% endset %}".repeat(40)
    );
    let cases = cases.into_iter().chain([(&*withs, "too much"), (&*blocks, "too much")]);
    for (source, part) in cases {
        let template = ChatTemplate::new(source, None, None).unwrap();
        // Again and again: what one rendering kept is not counted against the next.
        for _ in 0..2 {
            let rendered = template.render(&[message("user", "x")]);
            let error = rendered.expect_err(source).to_string();
            assert!(error.contains(part), "{source}: {error}");
        }
    }
    let fine = "{% set ns = namespace(x='', n=0) %}{% for m in messages %}{% set ns.x = ns.x ~ m.content %}\
                {% set ns.n = ns.n + 1 %}{% endfor %}{% set a, b = ns.x, ns %}{{ a }}{{ b.n }}";
    let fine = ChatTemplate::new(fine, None, None).unwrap();
    let messages = vec![message("user", "ab"); 3];
    assert_eq!(fine.render(&messages).unwrap(), "ababab3");
    let fine = "{%- macro m(a, b='-') -%}\n {{ a }}{{ b }} {%- endmacro -%}\n{{ m('x') }}{{ m(messages[0].content, 1) }}\
                {% with c = m %}\n{{ c(2) }}{% endwith %}{% set d | upper %}\ne{{ m() is defined }}{% endset %}\n{{ d }}";
    let fine = ChatTemplate::new(fine, None, None).unwrap();
    assert_eq!(fine.render(&messages).unwrap(), "x-ab12-ETRUE");
}

#[test]
fn damaged_templates_are_refused() {
    for source in [
        "{% if %}",
        "{{ ",
        "{% for x in %}",
        "{% include 'x' %}{%",
        &"{{(".repeat(100_000),
        &"[".repeat(2 << 20),
    ] {
        let result = ChatTemplate::new(source, None, None);
        assert!(
            matches!(result, Err(Error::InvalidFile { .. })),
            "{:?}",
            source.get(..30)
        );
    }
    let template = ChatTemplate::new("{% include 'other' %}", None, None).unwrap();
    assert!(template.render(&[message("user", "x")]).is_err());
    assert!(template.render(&[]).unwrap_err().to_string().contains("at least one"));
}

#[test]
fn a_percent_that_opens_and_closes_a_tag_is_an_error() {
    // The fuzzer's: a tag that seemed to end before it began.
    let source = "{{%}x{%- endgeneration -%}";
    assert!(ChatTemplate::new(source, None, None).is_err());
}

#[test]
fn generation_marks_and_dates() {
    let source = "{%- generation -%} a {%- endgeneration -%} {% generation %}b{% endgeneration %}";
    assert_eq!(
        ChatTemplate::new(source, None, None)
            .unwrap()
            .render(&[message("user", "x")])
            .unwrap(),
        "ab"
    );
    let date = ChatTemplate::new("{{ strftime_now('%d %b %Y') }}", None, None)
        .unwrap()
        .render(&[message("user", "x")]);
    assert_eq!(date.unwrap().len(), 11);
    let bad = ChatTemplate::new("{{ strftime_now('%Q') }}", None, None)
        .unwrap()
        .render(&[message("user", "x")]);
    assert!(bad.unwrap_err().to_string().contains("%Q"));
}
