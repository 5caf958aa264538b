# One vLLM engine over two nodes of one GPU each (GB10 / DGX Spark): a head that serves and a headless worker.
#
# One job, so that both halves are started, stopped and compared together. GPU memory here is host memory: what the page
# cache holds is missing on the GPU, so it is dropped before a start, and what must be free is read from /proc/meminfo.

variable "job_id" { type = string }
variable "namespace" { type = string }
variable "node_pool" { type = string }
variable "head" { type = string } # unique names of the two clients
variable "worker" { type = string }
variable "engine" { type = string }
variable "recipe" { type = string }
variable "image" { type = string } # repository@sha256:…, the same on both: NCCL and FlashInfer must be equal
variable "entrypoint" { type = list(string) }
variable "model_dir" { type = string } # the same path on both nodes
variable "cache_dir" { type = string }
variable "served_name" { type = string }
variable "args" { type = list(string) }
variable "env" { type = map(string) }
variable "head_env" { type = map(string) } # the node's own addresses and interfaces
variable "worker_env" { type = map(string) }
variable "head_gpu" { type = string }
variable "worker_gpu" { type = string }
variable "tensor_parallel" { type = number }
variable "pipeline_parallel" { type = number }
variable "master_address" { type = string } # the head's address on the link between the nodes
variable "master_port" { type = number }
variable "port" { type = number }
variable "cpu" { type = number } # MHz as shares: engines that sleep need none, so no cores are taken for one alone
variable "memory_mb" { type = number }
variable "shm_mb" { type = number }
variable "tmp_mb" { type = number }
variable "free_mib" { type = number } # memory that must be free on each node before the engine starts
variable "gate_tries" { type = number }
variable "ipc_mode" { type = string }
variable "overlay_root" { type = string }
variable "overlays" { type = map(string) }
variable "kill_timeout" { type = string }
variable "healthy_deadline" { type = string }
variable "progress_deadline" { type = string }

locals {
  # Page cache of an earlier load of the weights counts as used. Dirty pages stay, so they are written first.
  drop_caches = "sync; echo 3 > /host-vm/drop_caches; grep -E '^Mem(Free|Available)' /proc/meminfo"

  wait_for_memory = <<-EOT
    for try in $(seq "$TRIES"); do
      free=$(awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
      if [ "$free" -ge "$NEED" ]; then echo "memory is free: $free MiB of $NEED"; exit 0; fi
      echo "waiting for memory: $free MiB of $NEED are free"
      sleep 2
    done
    nvidia-smi
    exit 75
  EOT

  mounts = concat(
    [
      { type = "bind", source = var.model_dir, target = "/models/current", readonly = true },
      { type = "bind", source = var.cache_dir, target = "/root/.cache" },
      { type = "tmpfs", target = "/tmp", tmpfs_options = { size = var.tmp_mb * 1048576 } },
    ],
    [for file, path in var.overlays : {
      type = "bind", source = "${var.overlay_root}/${file}", target = path, readonly = true
    }],
  )

  # The last word wins in vLLM: what must hold for every engine comes last.
  args = concat(
    ["/models/current", "--served-model-name", var.served_name],
    var.args,
    [
      "--tensor-parallel-size", format("%d", var.tensor_parallel),
      "--pipeline-parallel-size", format("%d", var.pipeline_parallel),
      "--enable-sleep-mode",
      "--nnodes", "2",
      "--master-addr", var.master_address,
      "--master-port", format("%d", var.master_port),
    ],
  )

  env = merge(var.env, {
    ROTATOR_ENGINE             = var.engine
    NVIDIA_DRIVER_CAPABILITIES = "compute,utility"
    CUDA_DEVICE_ORDER          = "PCI_BUS_ID"
    VLLM_SERVER_DEV_MODE       = "1"
    HF_HUB_OFFLINE             = "1"
    TRANSFORMERS_OFFLINE       = "1"
    NCCL_IB_DISABLE            = "0" # RoCE, not sockets
    NCCL_IGNORE_CPU_AFFINITY   = "1"
    HOME                       = "/root"
    XDG_CACHE_HOME             = "/root/.cache"
    VLLM_CACHE_ROOT            = "/root/.cache/vllm"
    TRITON_CACHE_DIR           = "/root/.cache/triton"
    TORCHINDUCTOR_CACHE_DIR    = "/root/.cache/inductor"
    FLASHINFER_WORKSPACE_BASE  = "/root/.cache/flashinfer"
    CUDA_CACHE_PATH            = "/root/.cache/nv"
  })
}

job "vllm-engine-two-node" {
  id          = var.job_id
  name        = var.job_id
  namespace   = var.namespace
  type        = "service"
  node_pool   = var.node_pool
  datacenters = ["*"]

  meta = {
    role     = "vllm-engine"
    engine   = var.engine
    recipe   = var.recipe
    overlays = var.overlay_root
  }

  # Half an engine is none: what fails stays down on its node until the rotation service has stopped the other half.
  reschedule {
    attempts  = 0
    unlimited = false
  }

  update {
    max_parallel      = 1
    canary            = 0
    min_healthy_time  = "10s"
    healthy_deadline  = var.healthy_deadline
    progress_deadline = var.progress_deadline
    auto_revert       = false
  }

  group "head" {
    count = 1

    constraint {
      attribute = "${node.unique.name}"
      value     = var.head
    }

    update {
      health_check = "checks"
    }

    restart {
      attempts = 0
      mode     = "fail"
    }

    disconnect {
      lost_after = "1h"
      replace    = false
      reconcile  = "keep_original"
    }

    ephemeral_disk {
      size = 1500
    }

    network {
      mode = "host"
      port "http" {
        static       = var.port
        host_network = "loopback"
      }
      port "master" {
        static = var.master_port
      }
    }

    service {
      name     = var.job_id
      provider = "nomad"
      port     = "http"

      check {
        name     = "health"
        type     = "http"
        path     = "/health"
        interval = "10s"
        timeout  = "5s"
      }
    }

    task "cache-drop" {
      driver = "docker"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      config {
        image           = var.image
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        entrypoint      = ["/bin/bash", "-uec"]
        args            = [local.drop_caches]

        mounts = [{ type = "bind", source = "/proc/sys/vm", target = "/host-vm" }]
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }

    task "vram-gate" {
      driver = "docker"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      config {
        image           = var.image
        runtime         = "nvidia"
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        entrypoint      = ["/bin/bash", "-uc"]
        args            = [local.wait_for_memory]
      }

      env {
        NVIDIA_VISIBLE_DEVICES     = var.head_gpu
        NVIDIA_DRIVER_CAPABILITIES = "utility"
        NEED                       = "${var.free_mib}"
        TRIES                      = "${var.gate_tries}"
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }

    task "vllm" {
      driver       = "docker"
      kill_signal  = "SIGTERM"
      kill_timeout = var.kill_timeout

      config {
        image           = var.image
        runtime         = "nvidia"
        init            = true
        network_mode    = "host"
        ipc_mode        = var.ipc_mode
        shm_size        = var.shm_mb * 1048576
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mounts          = local.mounts
        entrypoint      = var.entrypoint

        args = concat(local.args, [
          "--node-rank", "0",
          "--host", "127.0.0.1",
          "--port", format("%d", var.port),
        ])

        devices = [{ host_path = "/dev/infiniband", container_path = "/dev/infiniband" }]

        ulimit {
          memlock = "-1"
          stack   = "67108864"
          nofile  = "1048576"
        }
      }

      env = merge(local.env, var.head_env, {
        NVIDIA_VISIBLE_DEVICES = var.head_gpu
      })

      template {
        destination = "${NOMAD_SECRETS_DIR}/engine.env"
        env         = true
        change_mode = "noop"
        data        = <<-EOT
          {{- if nomadVarExists "nomad/jobs/${var.job_id}" }}
          {{- with nomadVar "nomad/jobs/${var.job_id}" }}
          {{- range .Tuples }}
          {{ .K }}={{ .V | toJSON }}
          {{- end }}
          {{- end }}
          {{- end }}
        EOT
      }

      logs {
        max_files     = 10
        max_file_size = 50
      }

      resources {
        cpu    = var.cpu
        memory = var.memory_mb
      }
    }
  }

  group "worker" {
    count = 1

    constraint {
      attribute = "${node.unique.name}"
      value     = var.worker
    }

    # It has no port to ask: that its task runs is all there is to see here. The head's check tells of both.
    update {
      health_check = "task_states"
    }

    restart {
      attempts = 0
      mode     = "fail"
    }

    disconnect {
      lost_after = "1h"
      replace    = false
      reconcile  = "keep_original"
    }

    ephemeral_disk {
      size = 1500
    }

    network {
      mode = "host"
    }

    task "cache-drop" {
      driver = "docker"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      config {
        image           = var.image
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        entrypoint      = ["/bin/bash", "-uec"]
        args            = [local.drop_caches]

        mounts = [{ type = "bind", source = "/proc/sys/vm", target = "/host-vm" }]
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 64
      }
    }

    task "vram-gate" {
      driver = "docker"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      config {
        image           = var.image
        runtime         = "nvidia"
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        entrypoint      = ["/bin/bash", "-uc"]
        args            = [local.wait_for_memory]
      }

      env {
        NVIDIA_VISIBLE_DEVICES     = var.worker_gpu
        NVIDIA_DRIVER_CAPABILITIES = "utility"
        NEED                       = "${var.free_mib}"
        TRIES                      = "${var.gate_tries}"
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }

    task "vllm" {
      driver       = "docker"
      kill_signal  = "SIGTERM"
      kill_timeout = var.kill_timeout

      config {
        image           = var.image
        runtime         = "nvidia"
        init            = true
        network_mode    = "host"
        ipc_mode        = var.ipc_mode
        shm_size        = var.shm_mb * 1048576
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mounts          = local.mounts
        entrypoint      = var.entrypoint

        # Without --headless both nodes would bind the head's rendezvous port.
        args = concat(local.args, ["--node-rank", "1", "--headless"])

        devices = [{ host_path = "/dev/infiniband", container_path = "/dev/infiniband" }]

        ulimit {
          memlock = "-1"
          stack   = "67108864"
          nofile  = "1048576"
        }
      }

      env = merge(local.env, var.worker_env, {
        NVIDIA_VISIBLE_DEVICES = var.worker_gpu
      })

      logs {
        max_files     = 10
        max_file_size = 50
      }

      resources {
        cpu    = var.cpu
        memory = var.memory_mb
      }
    }
  }
}
