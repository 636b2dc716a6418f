//! Prompts that have never been seen, so that no measurement finds another's prefix in the cache.

use postgres::Client;

/// Makes prompts for the model `m`.
pub(crate) struct Prompts {
    client: Client,
    state: u64,
}

const WORDS: [&str; 12] = [
    "the", "value", "of", "a", "table", "and", "water", "people", "time", "river", "stone", "light",
];

impl Prompts {
    /// Prompts tokenized by the server behind `client`. Those of two seeds differ from the first token on.
    pub(crate) fn new(client: Client, seed: u64) -> Self {
        Self { client, state: seed }
    }

    /// A text of that many tokens.
    pub(crate) fn next(&mut self, tokens: i32) -> String {
        let mut text = format!("{}", self.random());
        for _ in 0..tokens {
            text.push(' ');
            text.push_str(WORDS[self.random() as usize % WORDS.len()]);
        }
        self.client
            .query_one(
                "SELECT candle.detokenize('m', (candle.tokenize('m', $1))[1:$2])",
                &[&text, &tokens],
            )
            .unwrap()
            .get(0)
    }

    /// The next of a linear congruential sequence (Knuth's MMIX), its upper bits.
    fn random(&mut self) -> u64 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.state >> 33
    }
}
