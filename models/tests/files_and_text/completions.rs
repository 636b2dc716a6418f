//! Streaming text: exhaustive small cases against the plain definition.

use std::sync::Arc;

use candle_models::{CompletionText, Error, Tokenizer};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A tokenizer of all bytes, in which token 1 + rank of the byte is that byte.
fn bytes() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::train_bpe(["x"].iter(), 257).unwrap())
}

/// The tokens of bytes, one each, valid UTF-8 or not.
fn tokens_of(tokenizer: &Tokenizer, text: &[u8]) -> Vec<u32> {
    let of =
        |byte: &u8| (0..257).find(|&token| !tokenizer.is_special(token) && tokenizer.token_bytes(token) == [*byte]);
    text.iter().map(|byte| of(byte).unwrap()).collect()
}

/// The definition: cut before the stop text that is complete first, the longest of those complete at once.
fn expected(text: &[u8], stops: &[String]) -> (String, bool) {
    let text = String::from_utf8_lossy(text);
    for (start, character) in text.char_indices() {
        let end = start + character.len_utf8();
        if let Some(stop) = stops
            .iter()
            .filter(|stop| text[..end].ends_with(stop.as_str()))
            .max_by_key(|stop| stop.len())
        {
            return (text[..end - stop.len()].to_owned(), true);
        }
    }
    (text.into_owned(), false)
}

/// Streams and checks that every piece is final: nothing that is emitted has to be taken back.
fn check(tokenizer: &Arc<Tokenizer>, text: &[u8], stops: &[String]) {
    let (whole, stops_early) = expected(text, stops);
    let mut completion = CompletionText::new(tokenizer.clone(), &[], stops).unwrap();
    let mut streamed = String::new();
    let mut stopped = false;
    for token in tokens_of(tokenizer, text) {
        let progress = completion.push(token);
        streamed += &progress.text;
        assert!(
            whole.starts_with(&streamed),
            "{text:?} {stops:?}: {streamed:?} of {whole:?}"
        );
        stopped |= progress.stopped;
        if stopped {
            break;
        }
    }
    streamed += &completion.finish();
    assert_eq!(streamed, whole, "{text:?} {stops:?}");
    // A stop text that an incomplete character completes is only seen at the end.
    assert!(
        stopped == stops_early || (stops_early && stops.iter().any(|stop| stop.contains('\u{fffd}'))),
        "{text:?}"
    );
    assert_eq!(completion.finish(), "");
}

#[test]
fn all_short_texts_over_a_small_alphabet() {
    let tokenizer = bytes();
    let stops: Vec<Vec<String>> = [
        &["ab"][..],
        &["a"],
        &["aab", "ba"],
        &["abab", "bb"],
        &["abb", "b"],
        &["aa", "aaa"],
        &["bab", "abba", "aabb"],
        &["é", "aé"],
    ]
    .iter()
    .map(|stops| stops.iter().map(|&stop| stop.to_owned()).collect())
    .collect();
    let alphabet = [b'a', b'b', 0xc3, 0xa9];
    for length in 0..=6 {
        for number in 0..alphabet.len().pow(length) {
            let text: Vec<u8> = (0..length)
                .map(|i| alphabet[number / alphabet.len().pow(i) % alphabet.len()])
                .collect();
            check(&tokenizer, &text, &stops[number % stops.len()]);
            check(&tokenizer, &text, &[]);
        }
    }
}

#[test]
fn random_bytes_and_stops() {
    let tokenizer = bytes();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let pieces: [&[u8]; 12] = [
        b"a",
        b"b",
        b"\n",
        b"User:",
        "é".as_bytes(),
        "语".as_bytes(),
        "😀".as_bytes(),
        b"\xf0\x9f",
        b"\xe8",
        b"\xff",
        b"\x80",
        b" ",
    ];
    let stop_pieces = ["a", "b", "\n", "User:", "é", "语", "😀", " ", "\u{fffd}"];
    for _ in 0..3000 {
        let text: Vec<u8> = (0..random.random_range(0..12))
            .flat_map(|_| pieces[random.random_range(0..12)].to_vec())
            .collect();
        let stop = |random: &mut ChaCha8Rng| -> String {
            (0..random.random_range(1..4))
                .map(|_| stop_pieces[random.random_range(0..9)])
                .collect()
        };
        let stops: Vec<String> = (0..random.random_range(0..4)).map(|_| stop(&mut random)).collect();
        check(&tokenizer, &text, &stops);
    }
}

#[test]
fn special_tokens_are_silent_and_stops_end_everything() {
    let tokenizer = bytes();
    let mut completion = CompletionText::new(tokenizer.clone(), &[], &["END".to_owned()]).unwrap();
    assert_eq!(completion.push(0).text, "");
    let mut text = String::new();
    let mut stopped = 0;
    for token in tokens_of(&tokenizer, b"ok ENDmore") {
        let progress = completion.push(token);
        text += &progress.text;
        stopped += u32::from(progress.stopped);
    }
    assert_eq!(text + &completion.finish(), "ok ");
    assert_eq!(stopped, 5, "every push from the stop on says so");
}

#[test]
fn bad_stops_are_refused() {
    let tokenizer = bytes();
    for stops in [vec![String::new()], vec!["x".to_owned(); 17], vec!["x".repeat(1025)]] {
        let result = CompletionText::new(tokenizer.clone(), &[], &stops);
        assert!(matches!(result, Err(Error::InvalidArgument(_))));
    }
}
