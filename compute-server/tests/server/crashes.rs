//! SIGKILL at random points: nothing committed is lost, nothing half-written is seen.

use std::time::Duration;

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::durability::{Committed, small};
use crate::support::{Client, TestServer, within};

/// Numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Runs transaction `number` of the training run.
async fn transaction(client: &Client, number: u64) -> Result<(), Status> {
    let id = format!("t{number}");
    let start = i64::try_from(number % 200).unwrap();
    let rows: [Vec<i64>; 2] = [(start..start + 9).collect(), (start + 3..start + 20).collect()];
    client.batch("m", within(&id), &[&rows[0], &rows[1]]).await?;
    if number % 3 == 2 {
        let request = UpdateModelRequest {
            transaction: within(&id),
            name: "m".into(),
            config_json: format!(r#"{{"learning_rate": 0.0{}, "beta1": 0.8}}"#, number + 1),
        };
        client.models.clone().update_model(request).await?;
    }
    if number % 2 == 1 {
        let request = StepRequest {
            transaction: within(&id),
            model: "m".into(),
            ..Default::default()
        };
        client.training.clone().step(request).await?;
    }
    client.publish(&id).await.map(drop)
}

/// What is committed, but for when it was and how long it took.
async fn state(client: &Client) -> Committed {
    let mut state = client.committed("m").await;
    state.row.created_at = None;
    for step in &mut state.steps {
        (step.created_at, step.duration_ms) = (None, 0.0);
    }
    state
}

/// Ends a server's process after a while, whatever it is doing.
fn kill_after(server: &TestServer, delay: Duration) -> std::thread::JoinHandle<()> {
    let process = server.process_id().to_string();
    std::thread::spawn(move || {
        std::thread::sleep(delay);
        let killed = std::process::Command::new("kill").args(["-KILL", &process]).status();
        assert!(killed.unwrap().success());
    })
}

#[tokio::test]
async fn nothing_committed_is_lost_by_50_kills_at_random_points_of_a_training_run() {
    let arguments = ["--max-replay-tokens", "150"];
    let straight = TestServer::start(&[]);
    let straight_client = straight.connect().await;
    straight_client.load(small("m")).await.unwrap();
    let mut straight_next = 0;

    let server = TestServer::start(&arguments);
    server.connect().await.load(small("m")).await.unwrap();
    let mut data = Some(server.kill());
    let mut random = Random(20);
    let (mut next, mut under_way) = (0, 0);
    for life in 0..50 {
        let server = TestServer::start_in(data.take().unwrap(), &arguments);
        let client = server.connect().await;
        // The transaction that was under way is committed, or it is not there at all.
        match client.publish(&format!("t{next}")).await {
            Ok(_) => (next, under_way) = (next + 1, under_way + 1),
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{status}"),
        }
        while straight_next < next {
            transaction(&straight_client, straight_next).await.unwrap();
            straight_next += 1;
        }
        assert_eq!(
            state(&client).await,
            state(&straight_client).await,
            "life {life}, {next} transactions"
        );
        if next > 0 {
            client.publish(&format!("t{}", next - 1)).await.unwrap();
        }
        let killer = kill_after(&server, Duration::from_micros(random.below(40_000)));
        while transaction(&client, next).await.is_ok() {
            next += 1;
        }
        killer.join().unwrap();
        data = Some(server.kill());
    }
    assert!(next > 50, "only {next} transactions in all lives");
    println!("{next} transactions, {under_way} of them committed though their answer was lost");
}

/// A model whose files take a while to write.
fn large() -> LoadModelRequest {
    let config = r#"{"architecture":"gpt2","layers":1,"width":64,"heads":4,"context_length":64,"vocabulary":10000,
                     "keep_last":2,"keep_tagged":false}"#;
    LoadModelRequest {
        config_json: config.into(),
        ..small("m")
    }
}

/// A step and its checkpoint in one transaction; the step.
async fn step_and_checkpoint(client: &Client, id: &str) -> Result<u64, Status> {
    client.batch("m", within(id), &[&[1, 2, 3, 4, 5]]).await?;
    client.step("m", within(id)).await?;
    let saved = client.checkpoint("m", within(id)).await?;
    client.publish(id).await?;
    Ok(saved.step)
}

#[tokio::test]
async fn a_kill_during_a_checkpoint_leaves_it_whole_or_not_at_all() {
    let server = TestServer::start(&[]);
    server.connect().await.load(large()).await.unwrap();
    let mut data = Some(server.kill());
    let mut random = Random(7);
    let (mut answered, mut made) = (0, 0);
    for life in 0..25 {
        let server = TestServer::start_in(data.take().unwrap(), &[]);
        let client = server.connect().await;
        let staging = server.data.path().join("staging");
        assert_eq!(std::fs::read_dir(staging).unwrap().count(), 0);
        let listed: Vec<u64> = client.list_checkpoints(None).await.iter().map(|row| row.step).collect();
        let step = client.describe("m", None).await.unwrap().step;
        // Step and checkpoint are of one transaction: both are there, or neither.
        assert!(step == answered || step == answered + 1, "{step} after {answered}");
        assert_eq!(listed, (step.saturating_sub(1).max(1)..=step).collect::<Vec<_>>());
        if let Some(last) = listed.last() {
            let restore = LoadModelRequest {
                name: "r".into(),
                source: format!("checkpoint://m/{last}"),
                ..Default::default()
            };
            client.load(restore).await.unwrap();
            assert_eq!(
                client.parameters("r", None).await.unwrap(),
                client.parameters("m", None).await.unwrap()
            );
            client.drop_model("r").await.unwrap();
        }
        answered = step;
        let killer = kill_after(&server, Duration::from_micros(random.below(250_000)));
        while let Ok(step) = step_and_checkpoint(&client, &format!("{life} {answered}")).await {
            (answered, made) = (step, made + 1);
        }
        killer.join().unwrap();
        data = Some(server.kill());
    }
    assert!(made > 5, "only {made} checkpoints");
}
