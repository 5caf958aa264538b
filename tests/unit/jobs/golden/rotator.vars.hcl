config_dir = "/etc/rotator"
cpu = 1000
env = {}
gpu_uuids = ["GPU-00000000-0000-4000-8000-000000000000", "GPU-11111111-1111-4111-8111-111111111111", "GPU-22222222-2222-4222-8222-222222222222", "GPU-33333333-3333-4333-8333-333333333333", "GPU-44444444-4444-4444-8444-444444444444"]
host_pids = true
image = "registry.example/rotator@sha256:4444444444444444444444444444444444444444444444444444444444444444"
job_id = "rotator"
memory_mb = 1024
mounts = {"/srv/models" = "/srv/models"}
namespace = "default"
node = "box"
node_pool = "gpu"
nomad_address = "http://127.0.0.1:4646"
port = 8400
state_dir = "/var/lib/rotator"
