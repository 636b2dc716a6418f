//! Many clients for a long time, and very many scans that nobody reads to the end: no error, the right answers, and
//! memory that stays where it is. `make soak` runs them at length, `make test` briefly.

use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use end_to_end_tests::database_errors::expect_failure;
use end_to_end_tests::fixture::Fixture;
use end_to_end_tests::processes::resident_kilobytes;
use postgres::{Client, NoTls};
use serde_json::{Value, json};

/// Sessions of Postgres, and as many clients of the HTTP endpoint.
const CLIENTS: usize = 64;

/// Memory may move by this much, which is far less than what the smallest leak would come to over a long run.
const FLAT_KILOBYTES: u64 = 48 * 1024;

/// A setting of a run, from the environment or short.
fn setting<T: FromStr>(name: &str, default: T) -> T {
    std::env::var(name)
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// One request, which SQL and HTTP can both make.
struct Question {
    model: &'static str,
    prompt: String,
    max_tokens: i32,
    temperature: f32,
    seed: i64,
}

impl Question {
    fn all() -> Vec<Self> {
        let one = |number: i32| Self {
            model: ["tiny", "endless"][number as usize % 2],
            // Half of them begin alike, so that prefixes are found in the cache while others are made.
            prompt: match number % 4 {
                0 | 1 => format!("{} {number}", "the value of a table ".repeat(2)),
                _ => format!("{number}: aggregate function"),
            },
            max_tokens: 4 + number % 24,
            temperature: [0.0, 1.0, 0.5][number as usize % 3],
            seed: number.into(),
        };
        (0..48).map(one).collect()
    }

    fn over_sql(&self, client: &mut Client) -> String {
        client
            .query_one(
                "SELECT completion FROM llm.generations
                 WHERE model = $1 AND prompt = $2 AND max_tokens = $3 AND temperature = $4 AND seed = $5",
                &[
                    &self.model,
                    &self.prompt,
                    &self.max_tokens,
                    &self.temperature,
                    &self.seed,
                ],
            )
            .unwrap()
            .get(0)
    }

    fn over_http(&self, agent: &ureq::Agent, address: &str) -> String {
        let body = json!({
            "model": self.model, "prompt": self.prompt, "max_tokens": self.max_tokens,
            "temperature": self.temperature, "seed": self.seed,
        });
        let url = format!("http://{address}/v1/completions");
        let mut response = agent.post(&url).send_json(body).unwrap();
        let answer: Value = response.body_mut().read_json().unwrap();
        // Postgres's text holds no NUL: there a replacement character stands for it.
        answer["choices"][0]["text"].as_str().unwrap().replace('\0', "\u{fffd}")
    }
}

/// What runs: the server and the sessions' backends.
struct Watched {
    server: u32,
    backends: Vec<i32>,
}

impl Watched {
    fn kilobytes(&self) -> [u64; 2] {
        let backends = self.backends.iter().map(|process| resident_kilobytes(*process as u32));
        [resident_kilobytes(self.server), backends.sum()]
    }

    /// Asserts that neither side has grown since `before`.
    fn assert_flat(&self, before: [u64; 2]) {
        let after = self.kilobytes();
        println!("resident kilobytes of server and backends: {before:?}, then {after:?}");
        for (side, (before, after)) in ["server", "backends"].into_iter().zip(before.into_iter().zip(after)) {
            assert!(after < before + FLAT_KILOBYTES, "{side}: {before} kB, then {after} kB");
        }
    }
}

fn backend(client: &mut Client) -> i32 {
    client.query_one("SELECT pg_backend_pid()", &[]).unwrap().get(0)
}

#[test]
fn sessions_and_http_clients_get_what_they_get_alone() {
    let seconds = setting("SOAK_SECONDS", 6);
    let fixture = Fixture::with_models();
    let questions = Question::all();
    let mut alone = fixture.connect();
    let expected: Vec<String> = questions.iter().map(|question| question.over_sql(&mut alone)).collect();
    let mut sessions: Vec<Client> = (0..CLIENTS).map(|_| fixture.connect()).collect();
    let watched = Watched {
        server: fixture.server.process_id(),
        backends: sessions.iter_mut().map(backend).collect(),
    };
    let address = fixture.server.http().unwrap().to_string();
    let (ended, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    // Each client asks the questions in an order of its own.
    let ask = |client: usize, answer: &mut dyn FnMut(&Question) -> String| {
        for turn in 0.. {
            let index = (client * 7 + turn * 5) % questions.len();
            assert_eq!(answer(&questions[index]), expected[index], "question {index}");
            answered.fetch_add(1, Ordering::Relaxed);
            // Everybody asks each question at least once.
            if ended.load(Ordering::Relaxed) && turn >= questions.len() / 8 {
                return;
            }
        }
    };
    let (ask, address, ended) = (&ask, &address, &ended);
    let before = thread::scope(|scope| {
        for (number, session) in sessions.iter_mut().enumerate() {
            scope.spawn(move || ask(number, &mut |question| question.over_sql(session)));
            scope.spawn(move || {
                let agent = ureq::Agent::new_with_defaults();
                ask(number + CLIENTS, &mut |question| question.over_http(&agent, address));
            });
        }
        // How long it lasts is what a soak is about; nothing is synchronised by it.
        thread::sleep(Duration::from_secs(seconds) / 3);
        let before = watched.kilobytes();
        thread::sleep(Duration::from_secs(seconds) * 2 / 3);
        ended.store(true, Ordering::Relaxed);
        before
    });
    println!("{} answers in {seconds} s", answered.load(Ordering::Relaxed));
    watched.assert_flat(before);
    fixture.assert_idle();
}

/// The ways in which a scan ends before its last row.
fn abandon(client: &mut Client, turn: u64) {
    const TOKENS: &str =
        "SELECT position FROM llm.generation_tokens WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 100000";
    match turn % 5 {
        0 => drop(client.query_one(&format!("{TOKENS} LIMIT 1"), &[]).unwrap()),
        1 => client
            .batch_execute(&format!(
                "BEGIN; DECLARE c CURSOR FOR {TOKENS}; FETCH 2 FROM c; CLOSE c; COMMIT"
            ))
            .unwrap(),
        2 => client
            .batch_execute(&format!(
                "BEGIN; DECLARE c CURSOR FOR {TOKENS}; FETCH 1 FROM c; ROLLBACK"
            ))
            .unwrap(),
        3 => {
            let divide = format!("SELECT 1 / (1 - position) FROM ({TOKENS}) s");
            expect_failure(client.batch_execute(&divide), "22012");
        }
        _ => {
            let bounded = format!("SET LOCAL statement_timeout = 3; {TOKENS}; COMMIT");
            expect_failure(client.batch_execute(&format!("BEGIN; {bounded}")), "57014");
            client.batch_execute("ROLLBACK").unwrap();
        }
    }
}

#[test]
fn abandoned_and_cancelled_scans_leave_nothing() {
    let scans: u64 = setting("SOAK_SCANS", 600);
    let fixture = Fixture::with_models();
    let mut client = fixture.connect();
    let watched = Watched {
        server: fixture.server.process_id(),
        backends: vec![backend(&mut client)],
    };
    let started = Instant::now();
    let mut before = watched.kilobytes();
    for turn in 0..scans {
        if turn == scans / 3 {
            before = watched.kilobytes();
        }
        abandon(&mut client, turn);
    }
    println!("{scans} scans in {:?}", started.elapsed());
    // A cancel from outside, while it runs.
    let token = client.cancel_token();
    let running = thread::spawn(move || {
        let result = client.batch_execute(
            "SELECT * FROM llm.generations WHERE model = 'endless' AND prompt = 'a' AND max_tokens = 150000",
        );
        (client, result)
    });
    fixture.wait_for_work("generate");
    token.cancel_query(NoTls).unwrap();
    let (_client, result) = running.join().unwrap();
    expect_failure(result, "57014");
    fixture.assert_idle();
    watched.assert_flat(before);
}
