{{/*
A pod of an executor. Takes {root, pool, labels, awaitsModel}: whether it is ready only once the model is loaded. Of one over
several hosts {leader, nodeLabel} as well: the address of its node 0, and the label that has a pod's number among the nodes.
*/}}
{{- define "scalellm.executorPod" -}}
{{- $security := .root.Values.security -}}
{{- $image := eq .pool.device "cuda" | ternary "executor-gpu" "executor" -}}
{{- $settings := dict "model" .pool.model "device" .pool.device "drain_limit_s" .pool.drainLimitSeconds -}}
{{- if gt (int .pool.tensorParallel) 1 }}{{ $_ := set $settings "tensor_parallel" .pool.tensorParallel }}{{ end -}}
{{- if gt (int .pool.nodes) 1 }}{{ $_ := set $settings "nodes" .pool.nodes }}{{ end -}}
{{- if $security.enabled -}}
{{- $settings = merge (include "scalellm.innerTls" (dict "options" (list "tls" "metrics_tls")) | fromYaml) $settings -}}
{{- end -}}
{{- $settings = mergeOverwrite $settings .pool.settings -}}
{{- $isGroup := and (eq .pool.device "cuda") (gt (int .pool.tensorParallel) 1) -}}
{{- $resources := deepCopy .pool.resources -}}
{{- if eq .pool.device "cuda" -}}
{{- $resources = mergeOverwrite (dict "limits" (dict "nvidia.com/gpu" (div .pool.tensorParallel .pool.nodes))) $resources -}}
{{- end -}}
metadata:
  labels:
    {{- include "scalellm.selector" .labels | nindent 4 }}
    {{- with .pool.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with .pool.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "scalellm.podSecurity" .root | nindent 2 }}
  {{- include "scalellm.placement" (merge (dict "values" .pool) .labels) | nindent 2 }}
  {{- with .pool.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add .pool.drainLimitSeconds 15 }}
  {{- if .root.Values.models.pull }}
  initContainers:
    {{- include "scalellm.pull" (dict "root" .root "image" $image "model" .pool.model "name" "model") | nindent 4 }}
  {{- end }}
  containers:
    - name: executor
      image: {{ include "scalellm.image" (dict "root" .root "name" $image) }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      ports:
        - {name: grpc, containerPort: 50061}
        - {name: metrics, containerPort: 9161}
      env:
        {{- include "scalellm.env" (dict "prefix" "EXECUTOR" "settings" $settings "env" .pool.env) | nindent 8 }}
        {{- with .leader }}
        - {name: SCALELLM_EXECUTOR_LEADER, value: {{ . | quote }}}
        - name: SCALELLM_EXECUTOR_NODE_RANK
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['{{ $.nodeLabel }}']"}}
        {{- end }}
        {{- if $security.enabled }}
        {{- include "scalellm.innerHealth" "executor" | nindent 8 }}
        {{- end }}
      {{- include "scalellm.probes" (dict "root" .root "port" 50061 "tls" $security.enabled "awaitsExecutor" .awaitsModel) | nindent 6 }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      {{- include "scalellm.containerSecurity" .root | nindent 6 }}
      volumeMounts:
        - {name: models, mountPath: /var/lib/scalellm/models, readOnly: true}
        - {name: kernels, mountPath: /var/lib/scalellm/kernels}
        - {name: tmp, mountPath: /tmp}
        {{- if $isGroup }}
        - {name: shared, mountPath: /dev/shm}
        {{- end }}
        {{- if $security.enabled }}
        - {name: secrets, mountPath: /run/secrets, readOnly: true}
        {{- end }}
  volumes:
    - name: models
      {{- toYaml .pool.modelVolume | nindent 6 }}
    - name: kernels
      {{- toYaml .pool.kernelVolume | nindent 6 }}
    - name: tmp
      emptyDir: {medium: Memory, sizeLimit: 256Mi}
    {{- if $isGroup }}
    - name: shared # by which NCCL passes data between GPUs of a host; a container has 64 MiB by itself
      emptyDir: {medium: Memory, sizeLimit: 1Gi}
    {{- end }}
    {{- if $security.enabled }}
    - name: secrets
      secret: {secretName: {{ include "scalellm.secretPrefix" .root }}-executor, defaultMode: 288} # 0440
    {{- end }}
{{- end }}
