//! Multiple-choice questions, answered by the likelihood of the choices as in lm-evaluation-harness (Gao et al., 2021).

use super::{Scores, Stretch};
use crate::error::{Error, Result};
use crate::tokenizer::{Documents, Tokenizer};

/// A question: what stands there, how it could go on, and how it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// What the choices continue.
    pub context: String,
    /// The choices.
    pub choices: Vec<String>,
    /// Number of the right one, from 0.
    pub answer: usize,
}

/// A context with one of its choices as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Continuation {
    /// Both.
    pub tokens: Vec<u32>,
    /// How many of the last of them are the choice's.
    pub choice: usize,
}

/// What was found for a question.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// Log-likelihood (natural logarithm) of each choice.
    pub log_likelihoods: Vec<f64>,
    /// The likeliest choice, of equal ones the first.
    pub choice: usize,
    /// The choice with the greatest log-likelihood per byte, of equal ones the first.
    pub choice_norm: usize,
}

impl Question {
    /// Checks a question.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without choices, for an empty choice, or an answer that is none of them.
    pub fn new(context: String, choices: Vec<String>, answer: i64) -> Result<Self> {
        if choices.is_empty() {
            return Err(Error::InvalidArgument("there are no choices".to_owned()));
        }
        if let Some(index) = choices.iter().position(String::is_empty) {
            return Err(Error::InvalidArgument(format!("choice {index} is empty")));
        }
        let last = choices.len() - 1;
        let number = usize::try_from(answer).ok().filter(|number| *number <= last);
        let answer = number.ok_or_else(|| {
            Error::InvalidArgument(format!(
                "the answer is {answer}; it must be the number of a choice, from 0 to {last}"
            ))
        })?;
        Ok(Self {
            context,
            choices,
            answer,
        })
    }

    /// The question's tokens, once for each choice. Context and choice are tokenized together, `delimiter` between them,
    /// white space at the context's end as part of the choice; the tokens behind those of the context alone are the
    /// choice's. Without a delimiter, a space stands between them unless there is white space already.
    ///
    /// # Errors
    /// Those of the tokenizer; [`Error::FailedPrecondition`] for an empty context where the tokenizer has no token for the
    /// beginning or end of a text; [`Error::InvalidArgument`] for a choice longer than `context_length`.
    pub fn continuations(
        &self,
        tokenizer: &Tokenizer,
        documents: &Documents<'_>,
        delimiter: Option<&str>,
        context_length: usize,
    ) -> Result<Vec<Continuation>> {
        let start: Vec<u32> = match documents.before() {
            [] if self.context.trim_end().is_empty() => vec![documents.end().ok_or_else(|| {
                Error::FailedPrecondition(
                    "a context is empty, and the tokenizer has no token for the beginning or the end of a text"
                        .to_owned(),
                )
            })?],
            before => before.to_vec(),
        };
        let context = self.context.trim_end();
        let space = &self.context[context.len()..];
        let before = tokenizer.encode_without_special_tokens(context)?.len();
        let continuation = |(index, choice): (usize, &String)| {
            let between = delimiter.unwrap_or(match space.is_empty() && !choice.starts_with(char::is_whitespace) {
                true => " ",
                false => "",
            });
            let whole = tokenizer.encode_without_special_tokens(&format!("{context}{space}{between}{choice}"))?;
            // Where a token spans both, the choice has those behind it.
            let before = before.min(whole.len().saturating_sub(1));
            let length = whole.len() - before;
            if length > context_length {
                return Err(Error::InvalidArgument(format!(
                    "choice {index} has {length} tokens, more than the context of {context_length}"
                )));
            }
            if length == 0 {
                return Err(Error::InvalidArgument(format!("choice {index} has no tokens")));
            }
            Ok(Continuation {
                tokens: start.iter().copied().chain(whole).collect(),
                choice: length,
            })
        };
        self.choices.iter().enumerate().map(continuation).collect()
    }

    /// The verdict over the scores of the choices.
    pub fn judge(&self, scores: &[Scores]) -> Verdict {
        let log_likelihoods: Vec<f64> = scores.iter().map(|scores| scores.log_likelihood).collect();
        let per_byte = log_likelihoods.iter().zip(&self.choices);
        let per_byte: Vec<f64> = per_byte
            .map(|(log_likelihood, choice)| log_likelihood / choice.len() as f64)
            .collect();
        Verdict {
            choice: first_greatest(&log_likelihoods),
            choice_norm: first_greatest(&per_byte),
            log_likelihoods,
        }
    }
}

impl Continuation {
    /// What is read to score the choice: the last tokens where there are more than `context_length` before the last.
    pub fn stretch(&self, context_length: usize) -> Stretch {
        let end = self.tokens.len() - 1;
        let start = end.saturating_sub(context_length);
        Stretch {
            inputs: self.tokens[start..end].to_vec(),
            targets: self.tokens[end + 1 - self.choice..].to_vec(),
        }
    }
}

fn first_greatest(values: &[f64]) -> usize {
    (0..values.len()).fold(0, |best, next| if values[next] > values[best] { next } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(choices: &[&str], answer: i64) -> Result<Question> {
        Question::new(
            "The".to_owned(),
            choices.iter().map(|choice| (*choice).to_owned()).collect(),
            answer,
        )
    }

    #[test]
    fn questions_are_checked() {
        assert!(question(&["a", "b"], 1).is_ok());
        for (choices, answer, reason) in [
            (&[][..], 0, "no choices"),
            (&["a", ""], 0, "choice 1 is empty"),
            (&["a", "b"], 2, "from 0 to 1"),
            (&["a", "b"], -1, "from 0 to 1"),
        ] {
            let error = question(choices, answer).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn the_verdict_goes_by_likelihood_and_by_likelihood_per_byte() {
        let question = question(&["a", "longer", "b"], 0).unwrap();
        let scores = [-2.0, -6.0, -2.0].map(|log_likelihood| Scores {
            log_likelihood,
            ..Scores::default()
        });
        let verdict = question.judge(&scores);
        // Equal ones: the first.
        assert_eq!((verdict.choice, verdict.choice_norm), (0, 1));
    }

    #[test]
    fn long_contexts_lose_their_beginning() {
        let continuation = Continuation {
            tokens: (0..10).collect(),
            choice: 2,
        };
        let stretch = continuation.stretch(4);
        assert_eq!((stretch.inputs, stretch.targets), (vec![5, 6, 7, 8], vec![8, 9]));
        let stretch = continuation.stretch(20);
        assert_eq!((stretch.inputs, stretch.targets), ((0..9).collect(), vec![8, 9]));
    }
}
