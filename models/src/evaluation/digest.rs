//! The digest of the rows that a model was evaluated on.

use sha2::{Digest as _, Sha256};

use super::Question;

/// SHA-256 over rows in their order, so that runs over the same rows are known by it. In PostgreSQL, of texts:
/// `encode(sha256(string_agg(convert_to(text, 'UTF8') || '\x00', '' ORDER BY …)), 'hex')`.
#[derive(Clone, Debug, Default)]
pub struct DatasetDigest(Sha256);

impl DatasetDigest {
    /// Adds a text: its UTF-8 bytes and a zero byte.
    pub fn add_text(&mut self, text: &str) {
        self.0.update(text);
        self.0.update([0]);
    }

    /// Adds a text that came as tokens: their decimal numbers as `{1,2,3}` and a zero byte.
    pub fn add_tokens(&mut self, tokens: &[u32]) {
        let numbers: Vec<String> = tokens.iter().map(u32::to_string).collect();
        self.add_text(&format!("{{{}}}", numbers.join(",")));
    }

    /// Adds a question: its context, each choice, and the answer's decimal number, each with a zero byte, and one zero byte
    /// more.
    pub fn add_question(&mut self, question: &Question) {
        self.add_text(&question.context);
        question.choices.iter().for_each(|choice| self.add_text(choice));
        self.add_text(&question.answer.to_string());
        self.0.update([0]);
    }

    /// In hexadecimal.
    pub fn finish(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_told_apart() {
        let of = |texts: &[&str]| {
            let mut digest = DatasetDigest::default();
            texts.iter().for_each(|text| digest.add_text(text));
            digest.finish()
        };
        // printf 'ab\0c\0' | sha256sum
        assert_eq!(
            of(&["ab", "c"]),
            "629c2f14f654f026086f2aefe1855533d0897f49df86a19073be17b237361b09"
        );
        assert_ne!(of(&["ab", "c"]), of(&["a", "bc"]));
        assert_ne!(of(&["ab", "c"]), of(&["c", "ab"]));
    }
}
