//! Nodes as the API shows and changes them.

use fanlight_ams::engine::Script;
use fanlight_api::ams::nodes::{NodeDelete, NodeGpuPatch, NodePatch, NodesPost};
use fanlight_client::ClientError;

use crate::{
    api::{Stack, terminal},
    stack::PATIENCE,
};

#[tokio::test(flavor = "multi_thread")]
async fn what_operators_set_of_a_node_is_shown_and_decides_what_fits() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    stack.application().await;
    let before = &stack.client.nodes().await.expect("listed")[0];
    assert_eq!((before.name.as_str(), before.status.as_str(), before.cpus), ("local", "online", 8));
    let patch = NodePatch {
        cpus: Some(2),
        cpu_allocation_rate: Some(1.0),
        memory: Some("1GB".into()),
        tags: Some(vec!["fast".into()]),
        public_address: Some("192.0.2.7".into()),
        ..NodePatch::default()
    };
    let operation = stack.client.update_node("local", &patch).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    let after = &stack.client.nodes().await.expect("listed")[0];
    assert_eq!((after.cpus, after.cpu_allocation_rate, after.memory.as_str()), (2, 1.0, "1GB"));
    assert_eq!((after.tags.clone(), after.public_address.as_str()), (vec!["fast".to_owned()], "192.0.2.7"));
    let (first, _) = (stack.launch().await, stack.launch().await);
    let instance = stack.client.instance(&first).await.expect("there");
    assert_eq!(instance.public_address, "192.0.2.7");
    // The manifest takes one CPU each: the third does not fit any more.
    let operation = stack.client.launch(&terminal(), false, None).await.expect("accepted");
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("does not fit").to_string();
    assert!(error.contains("without enough free CPUs"), "{error}");

    let patch = NodePatch { unscheduable: Some(true), cpus: Some(0), ..NodePatch::default() };
    let operation = stack.client.update_node("local", &patch).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    let after = &stack.client.nodes().await.expect("listed")[0];
    assert!(after.unschedulable && after.unscheduable);
    assert_eq!(after.cpus, 8, "0 is what the configuration says again");
    let operation = stack.client.launch(&terminal(), false, None).await.expect("accepted");
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("not taken").to_string();
    assert!(error.contains("unschedulable"), "{error}");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_of_a_node_can_be_forgotten_and_is_for_gpus_that_are_there() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    let rates = async |cpus, memory| {
        let patch = NodePatch {
            cpu_allocation_rate: Some(cpus),
            memory_allocation_rate: Some(memory),
            ..NodePatch::default()
        };
        let operation = stack.client.update_node("local", &patch).await.expect("accepted");
        stack.client.wait(&operation, PATIENCE).await.expect("done");
        let node = &stack.client.nodes().await.expect("listed")[0];
        (node.cpu_allocation_rate, node.memory_allocation_rate)
    };
    assert_eq!(rates(1.5, 1.25).await, (1.5, 1.25));
    assert_eq!(rates(0.0, 1.25).await, (4.0, 1.25), "0 is what the settings say again");
    assert_eq!(rates(1.5, 0.0).await, (1.5, 2.0));

    for (patch, needle) in [
        (
            NodePatch {
                gpus: Some(vec![NodeGpuPatch { id: 3, slots: Some(1), encoder_slots: None }]),
                ..NodePatch::default()
            },
            "argument gpus is invalid: 3: the node has no GPU",
        ),
        (NodePatch { gpu_slots: Some(2), ..NodePatch::default() }, "argument gpu_slots is invalid: 2"),
        (NodePatch { gpu_encoder_slots: Some(2), ..NodePatch::default() }, "argument gpu_encoder_slots"),
        (NodePatch { cpu_allocation_rate: Some(-1.0), ..NodePatch::default() }, "cpu_allocation_rate"),
    ] {
        let refused = stack.client.update_node("local", &patch).await;
        let Err(ClientError::Refused { status, text, .. }) = refused else {
            panic!("{patch:?} was accepted: {refused:?}")
        };
        assert!(status.as_u16() == 400 && text.contains(needle), "{text}");
    }
    let patch = NodePatch { gpu_slots: Some(0), ..NodePatch::default() };
    stack.client.update_node("local", &patch).await.expect("no slots of no GPU are as it is");
    stack.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_of_one_machine_takes_no_other_in_and_says_so_in_the_operation_and_the_node() {
    let stack = Stack::start(Script::Run, |_| {}).await;
    let post = NodesPost { name: "n2".into(), address: "192.0.2.9".into(), ..NodesPost::default() };
    let operation = stack.client.add_node(&post).await.expect("accepted");
    let error = stack.client.wait(&operation, PATIENCE).await.expect_err("not possible").to_string();
    assert!(error.contains("adding nodes not supported"), "{error}");
    let node = stack.client.nodes().await.expect("listed").into_iter().find(|node| node.name == "n2");
    let node = node.expect("it is shown");
    assert_eq!((node.status_code, node.status.as_str()), (-1, "error"));
    assert!(node.status_message.contains("adding nodes not supported"), "{}", node.status_message);
    let again = stack.client.add_node(&post).await;
    assert!(matches!(again, Err(ClientError::Refused { status, .. }) if status.as_u16() == 409), "{again:?}");
    let operation = stack.client.remove_node("n2", &NodeDelete::default()).await.expect("accepted");
    stack.client.wait(&operation, PATIENCE).await.expect("done");
    assert_eq!(stack.client.nodes().await.expect("listed").len(), 1);

    stack.application().await;
    stack.launch().await;
    let refused = stack.client.remove_node("local", &NodeDelete::default()).await;
    assert!(matches!(refused, Err(ClientError::Refused { .. })), "{refused:?}");
    stack.running.stop().await;
}
