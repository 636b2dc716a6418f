//! Tokenizers that are trained within transactions.

use candle_compute_proto::v1::*;
use tonic::{Code, Status};

use crate::support::{Client, TestServer, assert_status, within};

impl Client {
    async fn train(&self, name: &str, size: u32, transaction: Option<TransactionContext>) -> Result<u32, Status> {
        let texts = [
            "the quick brown fox jumps over the lazy dog",
            "it was the best of times, it was the worst of times",
        ];
        let request = TrainTokenizerRequest {
            transaction,
            name: name.into(),
            vocabulary_size: size,
            texts: texts.map(str::to_owned).to_vec(),
        };
        let trained = self
            .models
            .clone()
            .train_tokenizer(tokio_stream::iter([request]))
            .await?;
        Ok(trained.into_inner().vocabulary_size)
    }

    /// The vocabulary of a new model that uses the tokenizer.
    async fn vocabulary(
        &self,
        model: &str,
        tokenizer: &str,
        transaction: Option<TransactionContext>,
    ) -> Result<u32, Status> {
        let request = LoadModelRequest {
            transaction,
            name: model.into(),
            config_json: format!(
                r#"{{"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "context_length": 8, "tokenizer": "{tokenizer}"}}"#
            ),
            ..Default::default()
        };
        Ok(self.load(request).await?.vocabulary)
    }
}

#[tokio::test]
async fn a_tokenizer_is_part_of_its_transaction() {
    let server = TestServer::start(&[]);
    let client = server.connect().await;
    assert_eq!(client.train("a", 260, None).await.unwrap(), 260);
    client.train("a", 270, within("t")).await.unwrap();
    client.train("b", 265, within("t")).await.unwrap();
    assert_eq!(client.vocabulary("m", "a", within("t")).await.unwrap(), 270);
    assert_eq!(client.vocabulary("n", "b", within("t")).await.unwrap(), 265);
    // Others see what there was.
    assert_eq!(client.vocabulary("o", "a", None).await.unwrap(), 260);
    assert_status(client.vocabulary("p", "b", None).await, Code::NotFound, "42704");
    client.rollback("t", 1).await;
    assert_eq!(client.vocabulary("q", "a", None).await.unwrap(), 260);
    assert_status(client.vocabulary("p", "b", None).await, Code::NotFound, "42704");
    // A savepoint that is rolled back takes its own with it.
    client.train("a", 262, within("u")).await.unwrap();
    client.train("a", 264, crate::support::sub("u", 2)).await.unwrap();
    client.rollback("u", 2).await;
    client.publish("u").await.unwrap();
    let data = server.kill();
    let server = TestServer::start_in(data, &[]);
    let client = server.connect().await;
    assert_eq!(client.vocabulary("r", "a", None).await.unwrap(), 262);
    // Models keep the one that they were made with.
    assert_eq!(client.describe("o", None).await.unwrap().vocabulary, 260);
}
