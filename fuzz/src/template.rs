//! Chat templates, and what callers put into them.

use candle_models::{ChatMessage, ChatTemplate};

/// Renders the text before the first zero byte with messages made of the rest.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (template, content) = text.split_once('\0').unwrap_or((text.as_ref(), "Hello."));
    let Ok(template) = ChatTemplate::new(template, Some("<s>"), Some("</s>")) else {
        return;
    };
    let message = |(role, content): (&str, &str)| ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let messages = [
        ("system", "Be brief."),
        ("user", content),
        ("assistant", "Yes."),
        ("user", content),
    ];
    let _ = template.render(&messages.map(message));
}
