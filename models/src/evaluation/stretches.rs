//! Many stretches of tokens through the decoder in few passes.

use candle_core::Tensor;

use crate::decoder::{Decoder, KeyValueCache, SequenceStep};
use crate::error::{Error, Result};

/// Tokens that one pass reads.
const PASS_TOKENS: usize = 512;

/// Tokens of one stretch that a pass reads: how soon a cancel is noticed.
const CHUNK: usize = 256;

/// Logits that exist at one time: 64 MiB.
const BLOCK_LOGITS: usize = 1 << 24;

/// Tokens that are read at once, from an empty cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// What is read: at least one token, at most the context.
    pub inputs: Vec<u32>,
    /// What follows each of the last inputs: from one target to as many as there are inputs.
    pub targets: Vec<u32>,
}

/// What a stretch's targets came to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scores {
    /// Sum of the targets' log-probabilities (natural logarithm).
    pub log_likelihood: f64,
    /// Targets.
    pub targets: u64,
    /// Targets that are the likeliest at their place.
    pub likeliest: u64,
}

impl std::ops::AddAssign for Scores {
    fn add_assign(&mut self, other: Self) {
        self.log_likelihood += other.log_likelihood;
        self.targets += other.targets;
        self.likeliest += other.likeliest;
    }
}

/// A stretch of which some tokens may have been read.
struct Begun {
    index: usize,
    cache: KeyValueCache,
}

impl Decoder {
    /// The scores of every stretch, in order; they do not depend on what other stretches there are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a stretch that is empty or longer than the context, has no or too many targets, or a
    /// token outside the vocabulary; [`Error::FailedPrecondition`] where logits are not finite; [`Error::Cancelled`] soon
    /// after `cancelled` returns true.
    pub fn score_stretches(&self, stretches: &[Stretch], cancelled: &dyn Fn() -> bool) -> Result<Vec<Scores>> {
        for stretch in stretches {
            self.check_tokens(&stretch.inputs, self.config().context_length)?;
            self.check_tokens(&stretch.targets, stretch.inputs.len())?;
        }
        let mut scores = vec![Scores::default(); stretches.len()];
        let mut begun: Vec<Begun> = Vec::new();
        let mut next = 0;
        loop {
            if cancelled() {
                return Err(Error::Cancelled);
            }
            // Those that have begun go on; others begin while there is room.
            let mut tokens: usize = begun.iter().map(|begun| rest(begun, stretches)).sum();
            while next < stretches.len()
                && (tokens == 0 || tokens + stretches[next].inputs.len().min(CHUNK) <= PASS_TOKENS)
            {
                let cache = self.new_cache();
                begun.push(Begun { index: next, cache });
                tokens += stretches[next].inputs.len().min(CHUNK);
                next += 1;
            }
            if begun.is_empty() {
                return match scores.iter().any(|scores| scores.log_likelihood.is_nan()) {
                    true => Err(Error::logits_not_finite()),
                    false => Ok(scores),
                };
            }
            self.score_pass(stretches, &mut begun, &mut scores, cancelled)?;
            begun.retain(|begun| begun.cache.len() < stretches[begun.index].inputs.len());
        }
    }

    /// One pass over the next tokens of every begun stretch.
    fn score_pass(
        &self,
        stretches: &[Stretch],
        begun: &mut [Begun],
        scores: &mut [Scores],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<()> {
        let mut rows: Vec<u32> = Vec::new();
        let mut targets: Vec<i64> = Vec::new();
        // Of each begun stretch, how many of the targets are its.
        let mut counts: Vec<(usize, usize)> = Vec::new();
        let mut steps = Vec::with_capacity(begun.len());
        let mut first_row = 0;
        for Begun { index, cache } in begun.iter_mut() {
            let stretch = &stretches[*index];
            let range = cache.len()..stretch.inputs.len().min(cache.len() + CHUNK);
            let first_target = stretch.inputs.len() - stretch.targets.len();
            let predicting = range.start.max(first_target)..range.end.max(first_target);
            rows.extend(predicting.clone().map(|input| (first_row + input - range.start) as u32));
            let predicted = &stretch.targets[predicting.start - first_target..predicting.end - first_target];
            targets.extend(predicted.iter().map(|target| i64::from(*target)));
            counts.push((*index, predicting.len()));
            first_row += range.len();
            let tokens = &stretch.inputs[range];
            steps.push(SequenceStep { tokens, cache });
        }
        let hidden = self.hidden(&mut steps, cancelled)?;
        if rows.is_empty() {
            return Ok(());
        }
        let hidden = match rows.len() == first_row {
            true => hidden,
            false => hidden.index_select(&Tensor::from_vec(rows, targets.len(), hidden.device())?, 0)?,
        };
        let mut found = self.score_targets(&hidden, &targets)?.into_iter();
        for (index, count) in counts {
            found.by_ref().take(count).for_each(|score| scores[index] += score);
        }
        Ok(())
    }

    /// The score of the target of every row of the residual stream `hidden` `[rows, width]`; never all logits at once.
    fn score_targets(&self, hidden: &Tensor, targets: &[i64]) -> Result<Vec<Scores>> {
        let step = (BLOCK_LOGITS / self.config().vocabulary.max(1)).max(16);
        let mut scores = Vec::with_capacity(targets.len());
        for (block, targets) in targets.chunks(step).enumerate() {
            let hidden = hidden.narrow(0, block * step, targets.len())?;
            let mut logits: Vec<f32> = self.head(&hidden)?.flatten_all()?.to_vec1()?;
            let (mut values, mut likeliest) = (vec![0.0; targets.len()], vec![false; targets.len()]);
            candle_kernels_cpu::score_logits(&mut logits, targets, &mut values, &mut likeliest);
            scores.extend(values.iter().zip(&likeliest).map(|(value, likeliest)| Scores {
                log_likelihood: f64::from(*value),
                targets: 1,
                likeliest: u64::from(*likeliest),
            }));
        }
        Ok(scores)
    }
}

/// Tokens that the next pass reads of a stretch.
fn rest(begun: &Begun, stretches: &[Stretch]) -> usize {
    (stretches[begun.index].inputs.len() - begun.cache.len()).min(CHUNK)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use serde_json::json;

    use super::*;
    use crate::config::from_settings;
    use crate::decoder::Weight;

    /// A decoder of the context 600, and tokens for it.
    fn decoder() -> (Decoder, Vec<u32>) {
        let settings = json!({"architecture": "llama", "layers": 1, "width": 15, "heads": 3, "key_value_heads": 1,
            "head_dim": 4, "feed_forward_width": 9, "context_length": 600, "vocabulary": 61});
        let config = from_settings(settings.as_object().unwrap(), None).unwrap();
        let decoder = Decoder::initialize(config, &Device::Cpu, None, 5).unwrap();
        (decoder, (0..1300_u32).map(|i| (i * i * 7 + 3 * i + 1) % 61).collect())
    }

    #[test]
    fn stretches_are_scored_as_whole_sequences_are() {
        let (decoder, tokens) = decoder();
        let stretch = |start: usize, inputs: usize, targets: usize| Stretch {
            inputs: tokens[start..start + inputs].to_vec(),
            targets: tokens[start + 1 + inputs - targets..start + inputs + 1].to_vec(),
        };
        let stretches = [
            stretch(0, 1, 1),
            stretch(3, 600, 600),
            stretch(700, 300, 2),
            stretch(9, 7, 7),
            stretch(20, 599, 300),
            stretch(11, 5, 1),
        ];
        let scores = decoder.score_stretches(&stretches, &|| false).unwrap();
        for (stretch, scores) in stretches.iter().zip(&scores) {
            let first = stretch.inputs.len() - stretch.targets.len();
            let targets: Vec<Option<u32>> = std::iter::repeat_n(None, first)
                .chain(stretch.targets.iter().map(|target| Some(*target)))
                .collect();
            let losses = decoder.losses_unless(&stretch.inputs, &targets, &|| false).unwrap();
            let want: f64 = losses.into_iter().flatten().map(f64::from).sum();
            assert!(
                (scores.log_likelihood + want).abs() < 1e-5 * stretch.targets.len() as f64,
                "{scores:?} {want}"
            );
            assert_eq!(scores.targets, stretch.targets.len() as u64);
            let logits = decoder.logits(&stretch.inputs).unwrap().to_vec2::<f32>().unwrap();
            let likeliest =
                |row: &Vec<f32>| (0..61).fold(0, |best, next| if row[next] > row[best] { next } else { best });
            let right = logits[first..].iter().zip(&stretch.targets);
            let right = right
                .filter(|(row, target)| likeliest(row) == **target as usize)
                .count();
            assert_eq!(scores.likeliest, right as u64);
        }
        // Alone they come out as among others, bit for bit.
        for (stretch, scores) in stretches.iter().zip(&scores) {
            let alone = decoder
                .score_stretches(std::slice::from_ref(stretch), &|| false)
                .unwrap();
            assert_eq!(alone, [*scores]);
        }
        assert_eq!(decoder.score_stretches(&[], &|| false).unwrap(), []);
    }

    #[test]
    fn stretches_are_checked_and_cancelled() {
        let (decoder, tokens) = decoder();
        let stretch = |inputs: &[u32], targets: &[u32]| Stretch {
            inputs: inputs.to_vec(),
            targets: targets.to_vec(),
        };
        for wrong in [
            stretch(&tokens[..601], &tokens[..1]),
            stretch(&[], &[]),
            stretch(&[1], &[]),
            stretch(&[1], &[1, 2]),
            stretch(&[61], &[1]),
            stretch(&[1], &[61]),
        ] {
            let error = decoder
                .score_stretches(std::slice::from_ref(&wrong), &|| false)
                .unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        }
        let error = decoder.score_stretches(&[stretch(&[1], &[2])], &|| true).unwrap_err();
        assert!(matches!(error, Error::Cancelled));
        // A model that has diverged has no opinion; it must not win by it.
        let mut diverged = decoder;
        let head = diverged
            .parameter_id("lm_head.weight")
            .or_else(|_| diverged.parameter_id("model.embed_tokens.weight"));
        let head = diverged.weight_mut(head.unwrap());
        *head = Weight::Dense((head.to_f32().unwrap() * f64::INFINITY).unwrap());
        let error = diverged.score_stretches(&[stretch(&[1], &[2])], &|| false).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    }
}
