//! Renders a conversation with a model's own chat template: Jinja as transformers runs it.

mod bounds;
mod source;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use serde::Serialize;

use crate::deep_stack;
use crate::error::{Error, Result};

/// Longest template accepted, in bytes. The largest published ones are about 20 KB.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Longest prompt that a template may produce, in bytes.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Instructions a rendering may use besides those that its messages call for.
const BASE_FUEL: u64 = 1_000_000;
/// Further instructions per message.
const FUEL_PER_MESSAGE: u64 = 100_000;
const TEMPLATE_NAME: &str = "chat_template";

/// A message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, or another role that the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    bos: Option<String>,
    eos: Option<String>,
}

/// What `raise_exception` in a template carries to the caller.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

impl ChatTemplate {
    /// Compiles a template from its text. `bos` and `eos` are the texts of the tokenizer's special tokens; absent ones are undefined
    /// in the template, as in transformers.
    ///
    /// # Errors
    /// `InvalidFile` if the template is too long or not valid Jinja.
    pub fn new(text: &str, bos: Option<&str>, eos: Option<&str>) -> Result<Self> {
        let invalid = |reason: String| Error::InvalidFile {
            path: TEMPLATE_NAME.to_owned(),
            reason,
        };
        if text.len() > MAX_TEMPLATE_BYTES {
            return Err(invalid(format!(
                "it has {} bytes; at most {MAX_TEMPLATE_BYTES} are read",
                text.len()
            )));
        }
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment.add_filter("tojson", to_json);
        environment.add_filter(source::ASSIGNED, bounds::assigned);
        environment.add_filter(source::ASSIGNED_TO_ATTRIBUTE, bounds::assigned_to_attribute);
        let compile = || environment.add_template_owned(TEMPLATE_NAME, source::prepared(text));
        deep_stack::run("chat template", compile)?
            .ok_or_else(|| invalid("it cannot be compiled".to_owned()))?
            .map_err(|error| invalid(error.to_string()))?;
        Ok(Self {
            environment,
            source: text.to_owned(),
            bos: bos.map(str::to_owned),
            eos: eos.map(str::to_owned),
        })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Text of the token that begins a sequence.
    pub fn bos(&self) -> Option<&str> {
        self.bos.as_deref()
    }

    /// Text of the token that ends a sequence.
    pub fn eos(&self) -> Option<&str> {
        self.eos.as_deref()
    }

    /// The prompt of a conversation, ending where the assistant's answer begins. It already holds every special token
    /// as text: encode it with `Tokenizer::encode_without_special_tokens`.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no message, or the template refuses them (with the template's own words), fails on
    /// them, runs for too long or produces too much.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::InvalidArgument(
                "messages is empty; give at least one message".to_owned(),
            ));
        }
        // The library recurses where values are nested, and nothing else counts how deeply a template nests them.
        deep_stack::run("chat template", || self.render_here(messages))?.unwrap_or_else(|| {
            Err(Error::InvalidArgument(
                "the model's chat template cannot be rendered".to_owned(),
            ))
        })
    }

    fn render_here(&self, messages: &[ChatMessage]) -> Result<String> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(BASE_FUEL + FUEL_PER_MESSAGE * messages.len() as u64));
        let template = environment
            .get_template(TEMPLATE_NAME)
            .map_err(|error| refusal(&error))?;
        let mut output = BoundedOutput(Vec::new());
        template
            .render_captured_to(self.context(messages), &mut output)
            .map_err(|error| refusal(&error))?;
        String::from_utf8(output.0)
            .map_err(|_| Error::InvalidArgument("the chat template's output is not UTF-8".to_owned()))
    }

    fn context(&self, messages: &[ChatMessage]) -> Value {
        let mut context = vec![
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        context.extend(self.bos.as_deref().map(|bos| ("bos_token", Value::from(bos))));
        context.extend(self.eos.as_deref().map(|eos| ("eos_token", Value::from(eos))));
        context.into_iter().collect()
    }
}

/// The template's own words if it refused; otherwise what went wrong and where.
fn refusal(error: &minijinja::Error) -> Error {
    let mut reasons = Vec::new();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        reasons.push(current.to_string());
        if let Some(Refusal(message)) = current.downcast_ref() {
            return Error::InvalidArgument(format!("the model's chat template refuses the messages: {message}"));
        }
        cause = current.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::InvalidArgument("the model's chat template runs for too long on these messages".to_owned());
    }
    let reasons = reasons.join(": ");
    Error::InvalidArgument(format!("the model's chat template fails on the messages: {reasons}"))
}

/// Collects the output and refuses to grow past the limit.
struct BoundedOutput(Vec<u8>);

impl std::io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other(format!(
                "the output exceeds {MAX_OUTPUT_BYTES} bytes"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
}

/// `json.dumps` as transformers calls it: no HTML escapes, `, ` and `: ` as separators, optional `indent`.
fn to_json(value: &Value, options: Kwargs) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut output = Vec::new();
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut output, formatter))
                .map_err(failed)?;
        }
        None => {
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut output, PythonJson))
                .map_err(failed)?;
        }
    }
    Ok(Value::from_safe_string(String::from_utf8_lossy(&output).into_owned()))
}

/// Python's default JSON spacing.
struct PythonJson;

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The present date and time, in UTC, by the common `strftime` directives.
fn strftime_now(format: &str) -> std::result::Result<String, minijinja::Error> {
    let now = time::OffsetDateTime::now_utc();
    let (month, weekday) = (now.month().to_string(), now.weekday().to_string());
    let mut output = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            output.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => output += &format!("{:04}", now.year()),
            Some('y') => output += &format!("{:02}", now.year().rem_euclid(100)),
            Some('m') => output += &format!("{:02}", u8::from(now.month())),
            Some('d') => output += &format!("{:02}", now.day()),
            Some('j') => output += &format!("{:03}", now.ordinal()),
            Some('H') => output += &format!("{:02}", now.hour()),
            Some('I') => output += &format!("{:02}", (now.hour() + 11) % 12 + 1),
            Some('p') => output += if now.hour() < 12 { "AM" } else { "PM" },
            Some('M') => output += &format!("{:02}", now.minute()),
            Some('S') => output += &format!("{:02}", now.second()),
            Some('B') => output += &month,
            Some('b') => output += &month[..3],
            Some('A') => output += &weekday,
            Some('a') => output += &weekday[..3],
            Some('%') => output.push('%'),
            other => {
                let directive = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now does not know %{directive}");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(output)
}
